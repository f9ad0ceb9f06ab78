"""What stays of a layer, fitted to what the whole layer gave (the mask tuning of Kwon et al., 2204.09656).

The paper scales each part that stays; here its whole output projection is solved for, which costs the same at
inference: nothing. Layers are fitted in order, each on what really comes out of the fitted ones before it, so that it
also makes up for their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.observe.progress import track
from stages.core.structure import attention_output, encoder_layers, neuron_output
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 32
_RIDGE = 0.01
"""Weight of the change against the error, over the mean square of the inputs."""


class _ReachedError(Exception):
    """The first layer was called: nothing after it is wanted."""


@dataclass
class _Flow:
    """The calibration texts on their way through one model, a batch an entry."""

    states: list[Tensor] = field(default_factory=list)
    """What comes into the next layer, [batch, length, hidden]."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """The other arguments of a layer."""
    masks: list[Tensor] = field(default_factory=list)
    """bool [batch, length]."""


@dataclass
class NormalEquations:
    """Sums over tokens that a least-squares fit needs, in double precision."""

    gram: Tensor
    """[inputs + 1, inputs + 1]; the last input is 1, for the bias."""
    product: Tensor
    """[inputs + 1, outputs]"""

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> NormalEquations:
        """Start a fit."""
        return cls(torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64), torch.zeros(inputs + 1, outputs).double())

    def add(self, inputs: Tensor, residual: Tensor) -> None:
        """Add tokens: inputs [tokens, inputs] and what the outputs lack, [tokens, outputs]."""
        rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        self.gram += (rows.T @ rows).double()
        self.product += (rows.T @ residual).double()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Change of weight [outputs, inputs] and of bias [outputs] with the least squared error.

        Args:
            ridge: weight of the squared change of the weight, over the mean square of the inputs; the bias is free.
        """
        inputs = len(self.gram) - 1
        penalty = torch.zeros(inputs + 1, dtype=torch.float64)
        penalty[:inputs] = ridge * self.gram.diagonal()[:inputs].mean() if inputs else 0.0
        # Inputs that are always zero would make the matrix singular where there is no ridge to hold them.
        penalty[:inputs] += 1e-12
        change = torch.linalg.solve(self.gram + penalty.diag(), self.product).float()
        return change[:inputs].T, change[inputs]


@torch.no_grad()
def reconstruct(
    model: nn.Module, dense: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, ridge: float = _RIDGE
) -> None:
    """Fit the output projections of a pruned model to the model it was cut from, in place.

    Args:
        model: pruned, in evaluation mode.
        dense: the same model before the cut.
        rows: token ids of calibration texts.
        pad_id: token id that fills short texts.
        ridge: of the fits; see `NormalEquations.solve`.
    """
    wanted, given = _start(dense, rows, pad_id), _start(model, rows, pad_id)
    pairs = list(zip(encoder_layers(model), encoder_layers(dense), strict=True))
    for layer, whole in track(pairs, "reconstruct"):
        sums, after = _sums(whole, wanted)
        _fit(layer, "attention.output", attention_output(layer), given, [first for first, _ in sums], ridge)
        _fit(layer, "output", neuron_output(layer), given, [second for _, second in sums], ridge)
        wanted.states, given.states = after, _forward(layer, given)


def _start(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> _Flow:
    """Bring the texts to the first layer."""
    flow = _Flow()

    def stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        flow.states.append(arguments[0])
        flow.calls.append((arguments[1:], named))
        raise _ReachedError

    handle = encoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in length_batches([len(row) for row in rows], _BATCH_SIZE):
            inputs = pad_tensors([rows[i] for i in batch], pad_id)
            flow.masks.append(inputs["attention_mask"].bool())
            try:
                model(**inputs)
            except _ReachedError:
                continue
    finally:
        handle.remove()
    return flow


def _forward(layer: nn.Module, flow: _Flow) -> list[Tensor]:
    """Outputs of a layer, a batch an entry."""
    outputs = []
    for state, (arguments, named) in zip(flow.states, flow.calls, strict=True):
        output = layer(state, *arguments, **named)
        outputs.append(output if isinstance(output, Tensor) else output[0])
    return outputs


def _sums(layer: nn.Module, flow: _Flow) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """What goes into both norms of a layer, [batch, length, hidden] each, and the layer's outputs."""
    seen: list[Tensor] = []
    norms = [layer.get_submodule("attention.output.LayerNorm"), layer.get_submodule("output.LayerNorm")]
    handles = [norm.register_forward_pre_hook(_keep_in(seen)) for norm in norms]
    outputs = _forward(layer, flow)
    for handle in handles:
        handle.remove()
    return list(zip(seen[::2], seen[1::2], strict=True)), outputs


def _fit(
    layer: nn.Module, block: str, projection: nn.Linear, flow: _Flow, wanted: Sequence[Tensor], ridge: float
) -> None:
    """Solve for the projection at the end of a block, so that what goes into the block's norm is as wanted."""
    inputs: list[Tensor] = []
    sums: list[Tensor] = []
    handles = [
        projection.register_forward_pre_hook(_keep_in(inputs)),
        layer.get_submodule(f"{block}.LayerNorm").register_forward_pre_hook(_keep_in(sums)),
    ]
    _forward(layer, flow)
    for handle in handles:
        handle.remove()
    equations = NormalEquations.empty(projection.in_features, projection.out_features)
    for mask, features, given, aim in zip(flow.masks, inputs, sums, wanted, strict=True):
        equations.add(features[mask], (aim - given)[mask])
    weight, bias = equations.solve(ridge)
    if projection.in_features:
        projection.weight.add_(weight)
    projection.bias.add_(bias)


def _keep_in(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    return hook

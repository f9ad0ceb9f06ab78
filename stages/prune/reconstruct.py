"""What stays of a layer, fitted to what the whole layer gave (the mask tuning of Kwon et al., 2204.09656).

The paper scales each part that stays; here its whole output projection is solved for, which costs the same at
inference: nothing. Layers are fitted in order, each on what really comes out of the fitted ones before it, so that it
also makes up for their errors. Where hidden states are sliced, the matrix of the residual is solved for as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.observe.progress import track
from stages.core.structure import SlicedOutput, encoder_layers
from stages.prune.flow import Flow, forward, keep_in, start

_RIDGE = 0.01
"""Weight of the change against the error, over the mean square of the inputs."""


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

    def solve(self, ridge: float, parts: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Change of weight [outputs, inputs] and of bias [outputs] with the least squared error.

        Args:
            ridge: weight of the squared change of the weight, over the mean square of the inputs; the bias is free.
            parts: how many inputs each of several layers has, whose mean squares differ; none for one layer.
        """
        inputs = len(self.gram) - 1
        squares = torch.split(self.gram.diagonal()[:inputs], list(parts) or [inputs])
        penalty = torch.zeros(inputs + 1, dtype=torch.float64)
        # Inputs that are always zero would make the matrix singular where there is no ridge to hold them.
        penalty[:inputs] = torch.cat([ridge * part.mean().expand(len(part)) for part in squares]) + 1e-12
        change = torch.linalg.solve(self.gram + penalty.diag(), self.product).float()
        return change[:inputs].T, change[inputs]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    ridge: float = _RIDGE,
    bases: Sequence[Tensor] = (),
) -> None:
    """Fit the output projections of a pruned model to the model it was cut from, in place.

    Args:
        model: pruned, in evaluation mode.
        dense: the same model before the cut.
        rows: token ids of calibration texts.
        pad_id: token id that fills short texts.
        ridge: of the fits; see `NormalEquations.solve`.
        bases: where the cut sliced the hidden states, what brings those of `dense` to the width of `model`: two a
            layer, after attention and at its end, [hidden, width].
    """
    wanted, given = start(dense, rows, pad_id), start(model, rows, pad_id)
    pairs = list(zip(encoder_layers(model), encoder_layers(dense), strict=True))
    for index, (layer, whole) in enumerate(track(pairs, "reconstruct")):
        sums, after = _sums(whole, wanted)
        for place, block in enumerate(("attention.output", "output")):
            aims = [both[place] for both in sums]
            if bases:
                aims = [aim @ bases[2 * index + place] for aim in aims]
            _fit(layer, block, given, aims, ridge)
        wanted.states, given.states = after, forward(layer, given)


def _sums(layer: nn.Module, flow: Flow) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """What goes into both norms of a layer, [batch, length, hidden] each, and the layer's outputs."""
    seen: list[Tensor] = []
    norms = [layer.get_submodule("attention.output.LayerNorm"), layer.get_submodule("output.LayerNorm")]
    handles = [norm.register_forward_pre_hook(keep_in(seen)) for norm in norms]
    outputs = forward(layer, flow)
    for handle in handles:
        handle.remove()
    return list(zip(seen[::2], seen[1::2], strict=True)), outputs


def _fit(layer: nn.Module, block: str, flow: Flow, wanted: Sequence[Tensor], ridge: float) -> None:
    """Solve for the projections at the end of a block, so that what goes into the block's norm is as wanted."""
    end: Any = layer.get_submodule(block)
    projections: list[Any] = [end.dense, end.skip] if isinstance(end, SlicedOutput) else [end.dense]
    inputs: list[list[Tensor]] = [[] for _ in projections]
    sums: list[Tensor] = []
    handles = [part.register_forward_pre_hook(keep_in(seen)) for part, seen in zip(projections, inputs, strict=True)]
    handles.append(end.LayerNorm.register_forward_pre_hook(keep_in(sums)))
    forward(layer, flow)
    for handle in handles:
        handle.remove()
    sizes = [part.in_features for part in projections]
    equations = NormalEquations.empty(sum(sizes), end.dense.out_features)
    for mask, given, aim, *features in zip(flow.masks, sums, wanted, *inputs, strict=True):
        equations.add(torch.cat(features, dim=-1)[mask], (aim - given)[mask])
    weight, bias = equations.solve(ridge, sizes)
    for part, change in zip(projections, torch.split(weight, sizes, dim=1), strict=True):
        if part.in_features:
            part.weight.add_(change)
    end.dense.bias.add_(bias)

"""Calibration texts that go through a model layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.structure import encoder_layers
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 32


class _ReachedError(Exception):
    """The first layer was called: nothing after it is wanted."""


@dataclass
class Flow:
    """The calibration texts on their way through one model, a batch an entry."""

    states: list[Tensor] = field(default_factory=list)
    """What comes into the next layer, [batch, length, hidden]."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """The other arguments of a layer."""
    masks: list[Tensor] = field(default_factory=list)
    """bool [batch, length]."""


def start(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Flow:
    """Bring the texts to the first layer."""
    flow = Flow()

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


def forward(layer: nn.Module, flow: Flow) -> list[Tensor]:
    """Outputs of a layer, a batch an entry."""
    outputs = []
    for state, (arguments, named) in zip(flow.states, flow.calls, strict=True):
        output = layer(state, *arguments, **named)
        outputs.append(output if isinstance(output, Tensor) else output[0])
    return outputs


def keep_in(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Hook before a part that collects what goes into it."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    return hook

"""How much each attention head and feed-forward neuron matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.core.structure import attention_output, encoder_layers, head_size, layer_widths, neuron_output

Order = Literal["first_order", "second_order"]


@dataclass(frozen=True)
class Saliency:
    """What is known of the parts of one layer: scores, of which larger matter more, or gradients."""

    heads: Tensor
    """[heads], or [texts, heads]."""
    neurons: Tensor
    """[neurons], or [texts, neurons]."""


class Gates:
    """Multiplies every head's and neuron's output by a gate of one, a separate one for each text.

    The gradient of the loss by a gate tells what removing the part would change.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._gates: list[tuple[Tensor, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Gates:
        """Hang the gates into the model."""
        for index, layer in enumerate(encoder_layers(self.model)):
            size = head_size(layer)
            self._handles.append(attention_output(layer).register_forward_pre_hook(self._gate(index, 0, size)))
            self._handles.append(neuron_output(layer).register_forward_pre_hook(self._gate(index, 1, 1)))
        return self

    def __exit__(self, *problem: object) -> None:
        """Take the gates out."""
        for handle in self._handles:
            handle.remove()

    def open(self, texts: int) -> None:
        """Set fresh gates for a batch of so many texts."""
        self._gates = [
            (torch.ones(texts, width.heads, requires_grad=True), torch.ones(texts, width.neurons, requires_grad=True))
            for width in layer_widths(self.model)
        ]

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Gradients by the gates of heads and neurons, each [texts, parts], after a backward pass."""
        return [(_gradient(heads), _gradient(neurons)) for heads, neurons in self._gates]

    def _gate(self, layer: int, kind: int, repeat: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            gate = self._gates[layer][kind].repeat_interleave(repeat, dim=1)
            return (inputs[0] * gate[:, None, :],)

        return multiply


def gate_gradients(
    model: nn.Module, batches: Sequence[Sequence[int]], loss: Callable[[Sequence[int]], Tensor]
) -> list[Saliency]:
    """Gradient of each text's loss by the gates.

    Args:
        model: in evaluation mode.
        batches: indices of texts.
        loss: gives the summed loss of a batch; called with gates in place.

    Returns:
        for each layer the gradients by heads and neurons, each [texts, parts].
    """
    rows: list[list[tuple[Tensor, Tensor]]] = []
    with Gates(model) as gates:
        for batch in batches:
            gates.open(len(batch))
            loss(batch).backward()  # type: ignore[no-untyped-call]
            rows.append(gates.gradients())
    model.zero_grad(set_to_none=True)
    return [
        Saliency(torch.cat([heads for heads, _ in layer]), torch.cat([neurons for _, neurons in layer]))
        for layer in zip(*rows, strict=True)
    ]


def score(gradients: Sequence[Saliency], order: Order) -> list[Saliency]:
    """Score every head and neuron by the gradients of `gate_gradients`, one entry a layer."""

    def total(rows: Tensor) -> Tensor:
        return (rows.abs() if order == "first_order" else rows.square()).sum(dim=0)

    return [Saliency(total(layer.heads), total(layer.neurons)) for layer in gradients]


def _gradient(gate: Tensor) -> Tensor:
    if gate.grad is None and gate.numel():
        raise ValueError("the loss does not depend on every gate")
    return gate.detach() if gate.grad is None else gate.grad

"""Fast-gradient adversarial training (Miyato et al., 1605.07725)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_embeddings(model: nn.Module, epsilon: float) -> Iterator[None]:
    """Move the word embeddings by `epsilon` along their gradient, and back on leaving."""
    owner: Any = model
    weight: Tensor = owner.get_input_embeddings().weight
    gradient = weight.grad
    if gradient is None:
        raise ValueError("the word embeddings have no gradient yet")
    length = gradient.norm()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(gradient, alpha=float(epsilon / (length + 1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def add_adversarial_gradients(model: nn.Module, epsilon: float, backward: Callable[[], float]) -> None:
    """Add the gradients of the loss on perturbed embeddings to those already there."""
    with perturbed_embeddings(model, epsilon):
        backward()

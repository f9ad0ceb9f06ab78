"""A running mean of the weights (Polyak & Juditsky 1992; EMA), judged and kept in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The exponential moving average of the parameters that are trained; frozen ones and buffers stay the model's own.

    `torch.optim.swa_utils.AveragedModel` would copy the frozen ones too; its arithmetic is used here.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        """Start from the weights as they are; without a decay there is no average, and nothing here does anything."""
        self._decay = decay
        trained = {} if decay is None else dict(model.named_parameters())  # a weight tied to another appears once
        self._weights = {name: weight for name, weight in trained.items() if weight.requires_grad}
        self.tensors: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}
        """By the name of the parameter."""

    def state_dict(self) -> dict[str, Tensor]:
        """The average, to be saved."""
        return self.tensors

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> None:
        """Fill the average with one that was saved."""
        for name, tensor in state_dict.items():
            self.tensors[name].copy_(tensor)

    def update(self, steps: int) -> None:
        """Follow the weights after so many steps of the run.

        Early on the mean is over fewer steps, at most (1 + steps) / (10 + steps) of it being old, so that a short run
        does not end near its first weights (as TensorFlow's `ExponentialMovingAverage` does).
        """
        if self._decay is not None:
            decay = min(self._decay, (1 + steps) / (10 + steps))
            follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            follow(list(self.tensors.values()), list(self._weights.values()), steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and give the weights back at the end."""
        before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.apply()
        try:
            yield
        finally:
            self._fill(before)

    def apply(self) -> None:
        """Put the average in place of the weights for good."""
        self._fill(self.tensors)

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(tensors[name])

"""One clock and one judge for both sides.

They hang on PyTorch itself, on the optimizer's step and on the call of the model, so that they see the same of either
side and neither has to be changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.training.profile import StepProfile
from stages.core.hardware import peak_memory_mb


class Enough(BaseException):
    """The run has told all that was asked of it. No `Exception`, so that nobody on the way takes it for a fault."""


@dataclass(frozen=True)
class Asked:
    """What a run has to tell."""

    last_step: int
    """After which it is stopped."""
    judge_at: Sequence[int]
    """Steps after which the model is judged, with the clock stopped."""
    judge: Callable[[nn.Module], float]
    profiled: tuple[int, int] | None = None
    """First and last of the steps to profile, counted from 1; the first is 2 or later."""


@dataclass
class Watch:
    """What was seen of a run."""

    asked: Asked
    special: Tensor
    """Ids that are no tokens of a text; the mask is one, since it stands for a token."""
    seconds: list[float] = field(default_factory=list)
    """Since training began, evaluation left out, at the end of every step."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of texts seen until then."""
    positions: list[int] = field(default_factory=list)
    """Positions computed until then: tokens, special ones and padding."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Step, seconds and judgement."""
    peak_memory_mb: float = 0.0
    """Of the process, before it was judged for the first time."""
    profile: StepProfile = field(default_factory=StepProfile)
    model: Any = None
    _started: float = 0.0
    _paused: float = 0.0
    _optimizer: Any = None
    _seen: list[Tensor] = field(default_factory=list)

    def now(self) -> float:
        """Seconds since training began, pauses left out."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self._started - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Watch the training of a model; ends with `Enough` from within its optimizer."""
        self.model = model
        hooks = [
            register_optimizer_step_post_hook(lambda optimizer, *_: self._end_step(model, optimizer)),
            model.register_forward_pre_hook(self._count, with_kwargs=True),
        ]
        self._started, self._paused = time.perf_counter(), 0.0
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, model: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        """Keep the tokens that go in; they are counted when the clock stands still."""
        if torch.is_grad_enabled():
            self._seen.append((inputs[0] if inputs else named["input_ids"]).detach())

    def _end_step(self, model: nn.Module, optimizer: object) -> None:
        if self._optimizer is None:
            self._optimizer = optimizer
        if optimizer is not self._optimizer:
            return  # a step of several optimizers ends once
        self.seconds.append(self.now())
        with self.paused():
            step = len(self.seconds)
            first, last = self.asked.profiled or (0, 0)
            if step == last:
                self.profile.stop(last - first + 1)
            self._add_up()
            if not self.curve:
                self.peak_memory_mb = peak_memory_mb()
            if step in self.asked.judge_at:
                self._judge(model, step)
            if step == first - 1:
                self.profile.start()
        if step == self.asked.last_step:
            raise Enough

    def _add_up(self) -> None:
        tokens = sum(int((~torch.isin(ids.cpu(), self.special)).sum()) for ids in self._seen)
        positions = sum(ids.numel() for ids in self._seen)
        self._seen.clear()
        self.tokens.append(tokens + (self.tokens[-1] if self.tokens else 0))
        self.positions.append(positions + (self.positions[-1] if self.positions else 0))

    def _judge(self, model: nn.Module, step: int) -> None:
        training = model.training
        model.eval()
        value = self.asked.judge(model)
        model.train(training)
        self.curve.append((step, self.seconds[-1], value))

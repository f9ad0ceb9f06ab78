"""The training loop.

The best round by validation is kept. A run killed at any instant goes on from its last saved state and ends with the
same weights, bit for bit, because everything that decides the next step is saved; see `state`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from stages.core.observe.progress import track
from stages.core.stage import StageRun
from stages.core.tensors import to_device
from stages.core.training.compiling import compile_loss
from stages.core.training.embeddings import compact_embeddings
from stages.core.training.memory import fitted_to_memory, saved_bytes
from stages.core.training.optimizers import build_optimizer
from stages.core.training.precision import resolve_precision
from stages.core.training.prefetch import prefetched
from stages.core.training.processors import quick_on_processors
from stages.core.training.recipe import Position, Recipe, Tensors
from stages.core.training.schedules import rate_share
from stages.core.training.state import restore_state, save_state
from stages.core.training.throughput import Meter

_STEPS_BETWEEN_LIVE_POINTS = 10


class LossModule(nn.Module):
    """Model and loss as one module, so that whatever wraps a module sees the whole step."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        super().__init__()
        self.model = model
        self._recipe = recipe

    def forward(self, tensors: Tensors) -> Tensor:
        """Mean loss of a batch."""
        return self._recipe.loss(tensors)


class Trainer:
    """One training run of a model; `train` is the way to use it."""

    def __init__(self, model: nn.Module, recipe: Recipe, run: StageRun, phase: str):
        self.model, self.recipe, self.run, self.phase = model, recipe, run, phase
        self.folder = run.state / phase
        precision = resolve_precision(recipe.optimizer.precision)
        self.accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        self.model.to(self.accelerator.device)
        self.loss: Any = LossModule(model, recipe)
        self.steps = sum(len(recipe.batches(index)) for index in range(recipe.rounds))
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate_scale)
        self.position = Position()
        self.meter = Meter(model, precision, self.accelerator.device.type, self.position)
        self.best: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def fit(self) -> Position:
        """Train to the end, from the saved state where there is one."""
        self._restore()
        with ExitStack() as stack:
            self._prepare_steps(stack)
            interrupted = stack.enter_context(_interruptible())
            while self.position.round < self.recipe.rounds and not self._out_of_patience():
                self._train_round(interrupted)
                self._evaluate()
                self._save_if(interrupted.is_set() or self._save_is_due())
                if interrupted.is_set():
                    raise KeyboardInterrupt
        self._save_if(True)  # a stage with a later phase does not train this one again
        if self.recipe.keep_best and self.best:
            self.model.load_state_dict(self.best)
        self.model.to("cpu").eval()
        return self.position

    def _prepare_steps(self, stack: ExitStack) -> None:
        """Cut batches as the memory budget asks, and compile the loss if params say so."""
        params, position = self.run.params.training, self.position
        if position.round >= self.recipe.rounds or not (batches := self.recipe.batches(position.round)):
            return
        first = to_device(self.recipe.prepare(batches[0]), self.model)
        examples = len(next(iter(first.values())))
        self.model.train()
        parts = stack.enter_context(
            fitted_to_memory(self.model, params, examples, lambda parts: self._saved_bytes(split(first, parts)[0]))
        )
        position.parts = max(parts, position.parts)
        if params.compile:
            self.loss, values = compile_loss(self.loss, lambda loss: self._backward(loss, first, 1.0))
            self.run.record.log(position.step, {f"{self.phase}_{name}": value for name, value in values.items()})
            self.run.say(
                f"{self.phase} compiled in {values['compile_seconds']:.1f} s: {values['compiled_steps']:.2f} steps a "
                f"second, {values['eager_steps']:.2f} before"
            )

    def _saved_bytes(self, tensors: Tensors) -> int:
        def forward() -> Tensor:
            with self.accelerator.autocast():
                loss: Tensor = self.loss(tensors)
            return loss

        return saved_bytes(forward)

    def _train_round(self, interrupted: threading.Event) -> None:
        position = self.position
        waiting = self.recipe.batches(position.round)[position.batch :]
        description = f"{self.run.name} {self.phase} round {position.round + 1}/{self.recipe.rounds}"
        self.model.train()
        ready = track(prefetched(self.recipe.prepare, waiting), description, len(waiting), lambda: self.meter.shown)
        with self.meter.running():
            for tensors in ready:
                self._step(tensors)
                position.batch += 1
                self._save_if(interrupted.is_set() or self._save_is_due())
                if interrupted.is_set():
                    raise KeyboardInterrupt

    def _step(self, tensors: Tensors) -> None:
        position = self.position
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        value = self._add_gradients(tensors)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.maximum_gradient_norm)
        self.optimizer.step()
        if value != value:
            raise FloatingPointError(f"{self.run.name}: the loss is not a number at step {position.step}")
        position.step += 1
        position.loss_sum += value
        position.loss_count += 1
        self.meter.add(tensors, self.recipe.weight(tensors))
        if position.step % _STEPS_BETWEEN_LIVE_POINTS == 0:
            point = {"batch_loss": value, **self.meter.read()}
            self.run.record.log(position.step, {f"{self.phase}_{name}": number for name, number in point.items()})

    def _add_gradients(self, tensors: Tensors) -> float:
        """Add the gradients of a batch, one micro-batch after the other, and return its mean loss."""
        parts = split(tensors, self.position.parts)
        weights = [self.recipe.weight(part) for part in parts]
        total = sum(weights)
        return sum(
            self._add_part(to_device(part, self.model), weight / total)
            for part, weight in zip(parts, weights, strict=True)
            if weight
        )

    def _add_part(self, tensors: Tensors, share: float) -> float:
        """Add the gradients of a micro-batch that is so large a share of its batch; return its share of the loss."""
        value = self._backward(self.loss, tensors, share)
        if self.recipe.adversary is not None:
            self.recipe.adversary(lambda: self._backward(self.loss, tensors, share))
        return value

    def _backward(self, loss: Any, tensors: Tensors, share: float) -> float:
        with self.accelerator.autocast():
            value: Tensor = loss(tensors) * share
        self.accelerator.backward(value)
        return float(value.detach())

    def _evaluate(self) -> None:
        position = self.position
        self.model.eval()
        score, values = self.recipe.evaluate()
        row = {
            "epoch": float(position.round + 1),
            "train_loss": position.loss_sum / max(position.loss_count, 1),
            **values,
            "learning_rate": self._learning_rate(position.step - 1),
        }
        self.run.log(position.step, **row)
        position.history.append({"step": position.step, **row})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        self.run.say(f"{self.phase} {shown}")
        if position.best_score is None or score > position.best_score:
            position.best_score, position.best_round = score, position.round
            if self.recipe.keep_best:
                self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        position.round, position.batch = position.round + 1, 0
        position.loss_sum, position.loss_count = 0.0, 0

    def _out_of_patience(self) -> bool:
        patience, position = self.recipe.patience, self.position
        return patience is not None and position.round - 1 - position.best_round >= patience

    def _learning_rate(self, step: int) -> float:
        optimizer = self.recipe.optimizer
        return optimizer.learning_rate * rate_share(optimizer.schedule, step, self.steps)

    def _set_learning_rate(self) -> None:
        rate = self._learning_rate(self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > self.run.params.training.saves.seconds

    def _save_if(self, wanted: bool) -> None:
        if wanted:
            save_state(self.folder, self.model, self.optimizer, self.best, self.position)
            self._saved_at = time.monotonic()

    def _restore(self) -> None:
        restored = restore_state(self.folder, self.model, self.optimizer)
        if restored is None:
            return
        self.position, self.best = restored
        self.meter.position = self.position
        for row in self.position.history:
            self.run.log(int(row["step"]), **{name: value for name, value in row.items() if name != "step"})
        self.run.say(f"{self.phase} goes on from step {self.position.step}")


def train(model: nn.Module, recipe: Recipe, run: StageRun, phase: str) -> Position:
    """Train a model in place and leave it in evaluation mode.

    Args:
        model: whose parameters that require gradients are trained.
        recipe: what to train on.
        run: of the stage, for curves and resume state.
        phase: name of this training run within the stage.

    Returns:
        where it ended: rounds run, best round and score.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the state is safe on disk.
        FloatingPointError: if the loss is not a number.
    """
    with quick_on_processors(model), compact_embeddings(model, recipe.tokens):
        return Trainer(model, recipe, run, phase).fit()


def split(tensors: Tensors, parts: int) -> list[Tensors]:
    """Cut a batch into micro-batches of nearly equal numbers of examples."""
    cut = {name: tensor.tensor_split(parts) for name, tensor in tensors.items()}
    return [dict(zip(cut, part, strict=True)) for part in zip(*cut.values(), strict=True)]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that the loop looks at between steps."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: event.set())
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The training loop.

The best round by validation is kept. A run killed at any instant goes on from its last saved state and ends with the
same weights, bit for bit, because everything that decides the next step is saved; see `state`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from stages.core.observe.progress import track
from stages.core.stage import StageRun
from stages.core.tensors import to_device
from stages.core.training.devices import Devices, describe, on_first
from stages.core.training.optimizers import build_optimizer
from stages.core.training.precision import resolve_precision
from stages.core.training.prefetch import prefetched
from stages.core.training.recipe import Position, Recipe, Tensors
from stages.core.training.schedules import rate_share
from stages.core.training.state import restore_state, save_state

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
        self.devices = Devices(run.params.training.parallel, recipe, precision)
        self.loss = self.devices.place(LossModule(model, recipe), model, recipe)
        self.steps = sum(len(recipe.batches(index)) for index in range(recipe.rounds))
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate_scale)
        self.position = Position(processes=self.devices.sizes)
        self.best: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def fit(self) -> Position:
        """Train to the end, from the saved state where there is one."""
        self._restore()
        with _interruptible() as interrupted:
            while self.position.round < self.recipe.rounds and not self._out_of_patience():
                self._train_round(interrupted)
                self._evaluate()
                self._save_and_stop_if(interrupted)
        self._save()  # a stage with a later phase does not train this one again
        self.devices.leave()
        if self.recipe.keep_best and self.best:
            self.model.load_state_dict(self.best)
        self.model.to("cpu").eval()
        return self.position

    def _train_round(self, interrupted: threading.Event) -> None:
        position = self.position
        waiting = self.recipe.batches(position.round)[position.batch :]
        description = f"{self.run.name} {self.phase} round {position.round + 1}/{self.recipe.rounds}"
        self.model.train()
        for tensors in track(prefetched(self.recipe.prepare, waiting), description, total=len(waiting)):
            self._step(tensors)
            position.batch += 1
            self._save_and_stop_if(interrupted)

    def _step(self, tensors: Tensors) -> None:
        position = self.position
        self._set_learning_rate()
        self.devices.seed(position.step)
        self.optimizer.zero_grad(set_to_none=True)
        value = self._add_gradients(tensors)
        self.devices.clip(self.model, self.recipe.optimizer.maximum_gradient_norm)
        self.optimizer.step()
        if value != value:
            raise FloatingPointError(f"{self.run.name}: the loss is not a number at step {position.step}")
        position.step += 1
        position.loss_sum += value
        position.loss_count += 1
        if position.step % _STEPS_BETWEEN_LIVE_POINTS == 0:
            self.run.record.log(position.step, {f"{self.phase}_batch_loss": value})

    def _add_gradients(self, tensors: Tensors) -> float:
        """Add the gradients of a batch, one micro-batch after the other, and return its mean loss."""
        shares = self.devices.shares(tensors, self.position.parts, self.recipe.weight)
        value = 0.0
        for left, (part, share) in zip(reversed(range(len(shares))), shares, strict=True):
            with self.devices.waiting(self.loss, left > 0 and self.recipe.adversary is None):
                value += self._add_part(to_device(part, self.model), share)
        return self.devices.total(value)

    def _add_part(self, tensors: Tensors, share: float) -> float:
        """Add the gradients of a micro-batch that is so large a share of its batch; return its share of the loss."""
        value = self.devices.add_gradients(self.loss, tensors, share)
        if self.recipe.adversary is not None:
            self.recipe.adversary(lambda: self.devices.add_gradients(self.loss, tensors, share))
        return value

    def _evaluate(self) -> None:
        position = self.position
        score, values = self._judge()
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
                with self.devices.whole():
                    self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        position.round, position.batch = position.round + 1, 0
        position.loss_sum, position.loss_count = 0.0, 0

    def _judge(self) -> tuple[float, dict[str, float]]:
        with self.devices.whole():
            self.model.eval()
            return on_first(self.recipe.evaluate)

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

    def _save_and_stop_if(self, interrupted: threading.Event) -> None:
        stop, save = self.devices.any(interrupted.is_set(), self._save_is_due())
        if stop or save:
            self._save()
        if stop:
            raise KeyboardInterrupt

    def _save(self) -> None:
        with self.devices.whole():
            optimizer = self.devices.optimizer(self.optimizer)
            if self.devices.first:
                save_state(self.folder, self.model, optimizer, self.best, self.position)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        with self.devices.whole(changed=True):
            restored = restore_state(self.folder, self.model, self.devices.optimizer(self.optimizer))
        if restored is None:
            return
        self.position, self.best = restored
        for row in self.position.history:
            self.run.log(int(row["step"]), **{name: value for name, value in row.items() if name != "step"})
        self.run.say(f"{self.phase} goes on from step {self.position.step}")
        if self.position.processes != self.devices.sizes:
            self.run.say(
                f"{self.phase} was saved by {describe(self.position.processes)} and goes on with "
                f"{describe(self.devices.sizes)}: the batches stay as they are, but sums run in another order and "
                "dropout is drawn anew, so the weights will not be those of an unbroken run to the last bit"
            )
            self.position.processes = self.devices.sizes


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
    return Trainer(model, recipe, run, phase).fit()


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

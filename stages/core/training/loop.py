"""The training loop.

The best round by validation is kept. A run killed at any instant goes on from its last saved state and ends with the
same weights, bit for bit, because everything that decides the next step is saved; see `state`. Steps that go wrong are
skipped, undone or done again in smaller parts; see `faults` and `memory`.
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
from stages.core.training.averaging import WeightAverage
from stages.core.training.faults import (
    Step,
    after_rollback,
    find_fault,
    is_good_state,
    remember_bad_step,
    remember_good_step,
    stop_where_it_persists,
)
from stages.core.training.generators import Generators
from stages.core.training.memory import halve_micro_batches, is_out_of_memory
from stages.core.training.optimizers import build_optimizer
from stages.core.training.precision import autocast, build_accelerator, clip_gradients, resolve_precision
from stages.core.training.prefetch import prefetched
from stages.core.training.recipe import Batch, Position, Recipe, Tensors
from stages.core.training.schedules import rate_share
from stages.core.training.state import SavedStates, Stateful

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
        self.precision = resolve_precision(recipe.optimizer.precision)
        self.accelerator = build_accelerator(self.precision)
        self.model.to(self.accelerator.device)
        self.loss = LossModule(model, recipe)
        self.steps = sum(len(recipe.batches(index)) for index in range(recipe.rounds))
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate_scale)
        self.average = WeightAverage(model, recipe.optimizer.averaging)
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.generators = Generators()
        parts: dict[str, Stateful] = {
            "model": model,
            "optimizer": self.optimizer,
            "scaler": self.accelerator.scaler,
            "average": self.average,
            "generators": self.generators,
        }
        world = {"world_size": self.accelerator.num_processes, "batch_tokens": recipe.optimizer.batch_tokens}
        self.states = SavedStates(run.state / phase, parts, run.params.training.saves.keep, world, self._say)
        self._saved_at = time.monotonic()

    def fit(self) -> Position:
        """Train to the end, from the saved state where there is one."""
        try:
            self._restore()
            self._fit()
        finally:
            self.states.wait()  # whatever ends the training, what was saved is safe on disk
        self.average.apply()
        if self.recipe.keep_best and self.best:
            self.model.load_state_dict(self.best)
        self.model.to("cpu").eval()
        return self.position

    def _fit(self) -> None:
        with _interruptible() as interrupted:
            while self.position.round < self.recipe.rounds and not self._out_of_patience():
                if not self._train_round(interrupted):
                    continue
                with self.average.applied():
                    self._evaluate()
                self._save_where_due(interrupted)
        self._save()  # a stage with a later phase does not train this one again

    def _train_round(self, interrupted: threading.Event) -> bool:
        """Train to the end of the round; False where the run was rolled back and stands in a round before its end."""
        position = self.position
        batches = self._waiting_batches()
        description = f"{self.run.name} {self.phase} round {position.round + 1}/{self.recipe.rounds}"
        self.model.train()
        ready = track(prefetched(self.recipe.prepare, list(batches.values())), description, total=len(batches))
        for (index, batch), tensors in zip(batches.items(), ready, strict=True):
            position.batch = index
            self._step(tensors, batch)
            if position.faults.in_a_row == self.run.params.training.faults.skips:
                self._roll_back()
                return False
            position.batch = index + 1
            self._save_where_due(interrupted)
        return True

    def _waiting_batches(self) -> dict[int, Batch]:
        """Batches of the round that are still to come, by their number, without those that were bad before."""
        position = self.position
        return {
            index: batch
            for index, batch in enumerate(self.recipe.batches(position.round))
            if index >= position.batch and [position.round, index] not in position.faults.bad_batches
        }

    def _step(self, tensors: Tensors, batch: Batch) -> None:
        position, params = self.position, self.run.params.training.faults
        self._set_learning_rate()
        value = self._gradients(tensors)
        maximum_norm, scaler = self.recipe.optimizer.maximum_gradient_norm, self.accelerator.scaler
        norm = clip_gradients(self.accelerator, self.optimizer, self.model.parameters(), maximum_norm)
        step = Step(value, norm)
        fault = find_fault(step, position.faults, params, scaler.is_enabled())
        if fault is None:
            scaler.step(self.optimizer)
            remember_good_step(position.faults, value, params.window)
            self.average.update(position.step + 1)
            if self.recipe.after_step is not None:
                self.recipe.after_step(position.step + 1)
            position.loss_sum += value
            position.loss_count += 1
            if (position.step + 1) % _STEPS_BETWEEN_LIVE_POINTS == 0:
                self.run.record.log(position.step + 1, {f"{self.phase}_batch_loss": value})
        else:
            self._skip(fault, step, tensors, batch)
        scaler.update()
        position.step += 1

    def _skip(self, fault: str, step: Step, tensors: Tensors, batch: Batch) -> None:
        """Leave a bad step out.

        Raises:
            UserError: if it is one too many.
        """
        position, params = self.position, self.run.params.training.faults
        faults = position.faults
        remember_bad_step(faults, position.round, position.batch)
        self._say(f"step {position.step}: {fault}; skipped, {faults.in_a_row} in a row of at most {params.skips}")
        folder = self.run.state / f"{self.phase}-fault"
        stop_where_it_persists(fault, step, batch, tensors, position, params, folder)

    def _roll_back(self) -> None:
        """Go back to the last good saved state, to learn slower from there; without one, from the weights as they are.

        The state is saved again at once, so that a killed run remembers why it is there.
        """
        failed, factor = self.position, self.run.params.training.faults.rate_factor
        saved = self.states.restore(lambda position: is_good_state(position, failed.faults)) or self.states.restore()
        if saved is not None:
            self.best = saved.best
        self.position = after_rollback(failed if saved is None else saved.position, failed, factor)
        self._say(
            f"back to step {self.position.step}, with {self.position.faults.rate:.3g} of the learning rate and without "
            f"the bad batches; {self.position.faults.rollbacks} of at most {self.run.params.training.faults.rollbacks}"
        )
        self._save()

    def _gradients(self, tensors: Tensors) -> float:
        """Give the model the gradients of a batch and return its mean loss, in smaller parts where memory runs out.

        Raises:
            UserError: if there is not even memory for one example.
        """
        position, generators = self.position, self.generators.state_dict()
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._add_gradients(tensors)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the exception, whose traceback holds on to what has to go.
            halve_micro_batches(position, tensors)
            self._say(f"step {position.step}: out of memory; from here on in {position.parts} parts of the same batch")
            self.generators.load_state_dict(generators)

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

        def backward(factor: float) -> float:
            with autocast(self.precision, self.accelerator.device.type):
                loss = self.loss(tensors) * (share * factor)
            self.accelerator.backward(loss)  # scales it in fp16
            return float(loss.detach())

        return backward(1.0) if self.recipe.adversary is None else self.recipe.adversary(backward)

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
        share = rate_share(optimizer.schedule, step, self.steps)
        return optimizer.learning_rate * self.position.faults.rate * share

    def _set_learning_rate(self) -> None:
        rate = self._learning_rate(self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _save_where_due(self, interrupted: threading.Event) -> None:
        """Save the state when it is time to, and before an interrupt ends the run."""
        saves = self.run.params.training.saves
        by_clock = time.monotonic() - self._saved_at > saves.seconds
        by_steps = saves.steps is not None and self.position.step % saves.steps == 0
        if interrupted.is_set() or by_clock or by_steps:
            self._save()
        if interrupted.is_set():
            raise KeyboardInterrupt

    def _save(self) -> None:
        self.states.save(self.position, self.best)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        saved, processes = self.states.restore(), self.accelerator.num_processes
        if saved is None:
            self._save()  # so that there is always a way back
            return
        self.position, self.best = saved.position, saved.best
        for row in self.position.history:
            self.run.log(int(row["step"]), **{name: value for name, value in row.items() if name != "step"})
        self._say(f"goes on from step {self.position.step}")
        if saved.world_size != processes:
            self._say(
                f"was saved by {saved.world_size} processes and goes on with {processes}: the batches stay the same, "
                "but dropout draws and the order of sums do not, so the weights are no longer the same bit for bit"
            )

    def _say(self, message: str) -> None:
        self.run.say(f"{self.phase} {message}")


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
        UserError: if steps stay bad after every skip and way back, or one example is too large for the memory.
    """
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

"""The training loop.

The best round by validation is kept. A run killed at any instant goes on from its last saved state and ends with the
same weights, bit for bit, because everything that decides the next step is saved; see `state`. Steps that go wrong are
skipped, undone or done again in smaller parts; see `faults` and `memory`.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from stages.core.observe.progress import track
from stages.core.stage import StageRun
from stages.core.tensors import to_device
from stages.core.training.averaging import WeightAverage
from stages.core.training.compiling import compile_loss
from stages.core.training.devices import Devices, describe, on_first
from stages.core.training.embeddings import compact_embeddings
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
from stages.core.training.memory import fitted_to_memory, halve_micro_batches, is_out_of_memory, saved_bytes
from stages.core.training.optimizers import build_optimizer
from stages.core.training.precision import resolve_precision
from stages.core.training.prefetch import prefetched
from stages.core.training.processors import quick_on_processors
from stages.core.training.recipe import Batch, Position, Recipe, Tensors, split
from stages.core.training.schedules import rate_share
from stages.core.training.state import Saved, SavedStates, Stateful
from stages.core.training.throughput import Meter, count_labels

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
        precision = resolve_precision(recipe.optimizer.precision)
        self.devices = Devices(run.params.training.parallel, recipe, precision)
        self.scaler = self.devices.accelerator.scaler
        self.position = Position(processes=self.devices.sizes)
        self.meter = Meter(model, precision, self.devices.accelerator.device.type, self.devices.parallel.processes)
        self.loss: Any = self.devices.place(LossModule(model, recipe), model, recipe)
        self.steps = sum(len(recipe.batches(index)) for index in range(recipe.rounds))
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate_scale)
        self.average = WeightAverage(model, recipe.optimizer.averaging)
        self.best: dict[str, Tensor] = {}
        self.generators = Generators()
        self.states = SavedStates(run.state / phase, run.params.saves.keep, self._say)
        self._saved_at = time.monotonic()

    def fit(self) -> Position:
        """Train to the end, from the saved state where there is one."""
        try:
            self._restore()
            self._fit()
        finally:
            self.states.wait()  # whatever ends the training, what was saved is safe on disk
        self.devices.leave()
        self.average.apply()
        if self.recipe.keep_best and self.best:
            self.model.load_state_dict(self.best)
        self.model.to("cpu").eval()
        return self.position

    def _fit(self) -> None:
        with ExitStack() as stack:
            self._prepare_steps(stack)
            interrupted = stack.enter_context(_interruptible())
            while self.position.round < self.recipe.rounds and not self._out_of_patience():
                if not self._train_round(interrupted):
                    continue
                with self.average.applied():
                    self._evaluate()
                self._save_where_due(interrupted)
        self._save()  # a stage with a later phase does not train this one again

    def _prepare_steps(self, stack: ExitStack) -> None:
        """Cut batches as the memory budget asks, and compile the loss if params say so."""
        params, position = self.run.params.training, self.position
        every_round = (self.recipe.batches(index) for index in range(self.recipe.rounds))
        batches = next((batches for batches in every_round if batches), None)
        if position.round >= self.recipe.rounds or batches is None:
            return
        # The first batch of all, also where the run goes on from later: what is chosen here must be the same again.
        first = to_device(self.recipe.prepare(batches[0]), self.model)
        examples = len(next(iter(first.values())))
        self.model.train()
        kept = int(self.recipe.keep_best) + int(self.recipe.optimizer.averaging is not None)
        parts = stack.enter_context(
            fitted_to_memory(
                self.model, params, examples, lambda parts: self._saved_bytes(split(first, parts)[0]), kept
            )
        )
        position.parts = max(parts, position.parts)
        if params.compile:
            part = split(first, position.parts)[0]
            self.loss, values = compile_loss(self.loss, lambda loss: self.devices.add_gradients(loss, part, 1.0))
            self.run.record.log(position.step, {f"{self.phase}_{name}": value for name, value in values.items()})
            self._say(
                f"compiled in {values['compile_seconds']:.1f} s: {values['compiled_steps']:.2f} steps a "
                f"second, {values['eager_steps']:.2f} before"
            )

    def _saved_bytes(self, tensors: Tensors) -> int:
        def forward() -> Tensor:
            with self.devices.autocast():
                loss: Tensor = self.loss(tensors)
            return loss

        return saved_bytes(forward)

    def _train_round(self, interrupted: threading.Event) -> bool:
        """Train to the end of the round; False where the run was rolled back and stands in a round before its end."""
        position = self.position
        batches = self._waiting_batches()
        description = f"{self.run.name} {self.phase} round {position.round + 1}/{self.recipe.rounds}"
        self.model.train()
        ready = prefetched(self.recipe.prepare, list(batches.values()))
        shown = track(ready, description, len(batches), lambda: self.meter.shown)
        with self.meter.running(position):
            for (index, batch), tensors in zip(batches.items(), shown, strict=True):
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
        self.devices.seed(position.step)
        value = self._gradients(tensors)
        if all(parameter.grad is None for parameter in self.model.parameters()):
            position.step += 1  # nothing in the batch has a label
            return
        norm = self.devices.clip(self.model, self.optimizer, self.recipe.optimizer.maximum_gradient_norm)
        step = Step(value, norm)
        fault = find_fault(step, position.faults, params, self.scaler.is_enabled())
        if fault is None:
            self.scaler.step(self.optimizer)
            remember_good_step(position.faults, value, params.window)
            if math.isfinite(norm):  # where it is not, the scaler has left the step out
                self._follow_step(position.step + 1)
            position.loss_sum += value
            position.loss_count += 1
            self.meter.add(tensors, count_labels(tensors))
            self._log_live(position.step + 1, value)
        else:
            self._skip(fault, step, tensors, batch)
        self.scaler.update()
        position.step += 1

    def _follow_step(self, taken: int) -> None:
        """Do what follows a step that was taken."""
        self.average.update(taken)
        if self.recipe.after_step is not None:
            self.recipe.after_step(taken)

    def _log_live(self, step: int, loss: float) -> None:
        """Every few steps, add the loss and the speed to the live curves."""
        if step % _STEPS_BETWEEN_LIVE_POINTS == 0:
            point = {"batch_loss": loss, **self.meter.read()}
            self.run.record.log(step, {f"{self.phase}_{name}": value for name, value in point.items()})

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
        saved = self._go_back(lambda position: is_good_state(position, failed.faults)) or self._go_back()
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
                self.devices.check_alone(f"step {position.step}: out of memory")
            # Outside of the exception, whose traceback holds on to what has to go.
            halve_micro_batches(position, tensors)
            self._say(f"step {position.step}: out of memory; from here on in {position.parts} parts of the same batch")
            self.generators.load_state_dict(generators)

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

        def backward(factor: float) -> float:
            return self.devices.add_gradients(self.loss, tensors, share * factor)

        return backward(1.0) if self.recipe.adversary is None else self.recipe.adversary(backward)

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
        share = rate_share(optimizer.schedule, step, self.steps)
        return optimizer.learning_rate * self.position.faults.rate * share

    def _set_learning_rate(self) -> None:
        rate = self._learning_rate(self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _save_where_due(self, interrupted: threading.Event) -> None:
        """Save the state when it is time to, and before an interrupt ends the run."""
        saves = self.run.params.saves
        by_clock = time.monotonic() - self._saved_at > saves.seconds
        by_steps = saves.steps is not None and self.position.step % saves.steps == 0
        stop, save = self.devices.any(interrupted.is_set(), by_clock or by_steps)
        if stop or save:
            self._save()
        if stop:
            raise KeyboardInterrupt

    def _save(self) -> None:
        with self.devices.whole():
            parts = self._parts()
            if self.devices.first:
                self.states.save(self.position, self.best, parts)
        self._saved_at = time.monotonic()

    def _parts(self) -> dict[str, Stateful]:
        """What is saved, by name; all processes must come here, with the model whole."""
        return {
            "model": self.model,
            "optimizer": self.devices.optimizer(self.optimizer),
            "scaler": self.scaler,
            "average": self.average,
            "generators": self.generators,
        }

    def _go_back(self, usable: Callable[[Position], bool] = lambda position: True) -> Saved | None:
        """Bring everything back to the newest saved state that is usable."""
        self.states.wait()
        self.devices.meet()  # the first process has written what all read
        with self.devices.whole(changed=True):
            return self.states.restore(self._parts(), usable)

    def _restore(self) -> None:
        saved = self._go_back()
        if saved is None:
            self._save()  # so that there is always a way back
            return
        self.position, self.best = saved.position, saved.best
        for row in self.position.history:
            self.run.log(int(row["step"]), **{name: value for name, value in row.items() if name != "step"})
        self._say(f"goes on from step {self.position.step}")
        if self.position.processes != self.devices.sizes:
            self._say(
                f"was saved by {describe(self.position.processes)} and goes on with {describe(self.devices.sizes)}: "
                "the batches stay as they are, but sums run in another order and dropout is drawn anew, so the weights "
                "will not be those of an unbroken run to the last bit"
            )
            self.position.processes = self.devices.sizes

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
    with quick_on_processors(model), compact_embeddings(model, recipe.tokens):
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

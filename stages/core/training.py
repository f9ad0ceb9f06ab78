"""The training loop of every stage that trains.

AdamW with warm-up, decay and clipping, in the precision that params ask for; the best round by validation is kept.
A run killed at any instant goes on from its last saved state and ends with the same weights, bit for bit, because
everything that decides the next step is saved: weights, moments, generator, position.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stages.core.artifacts import publish, read_json, verify, write_json, write_manifest
from stages.core.observe.progress import track
from stages.core.params import OptimizerParams
from stages.core.stage import StageRun

Batch = Sequence[int]
_SECONDS_BETWEEN_SAVES = 60.0
_STEPS_BETWEEN_LIVE_POINTS = 10


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how it is judged."""

    optimizer: OptimizerParams
    rounds: int
    """Epochs, or parts of a run of steps; each ends with an evaluation."""
    batches: Callable[[int], Sequence[Batch]]
    """Batches of a round; must depend on nothing but the round's number."""
    loss: Callable[[Batch], Tensor]
    """Loss of a batch, computed under autocast."""
    evaluate: Callable[[], tuple[float, dict[str, float]]]
    """A score, larger is better, and the values to add to the curves."""
    patience: int | None = None
    """Stop after so many rounds without a better score; None runs them all."""
    keep_best: bool = True
    """Whether the weights of the best round are kept, or those of the last."""
    learning_rate_scale: Callable[[str], float] = field(default=lambda name: 1.0)
    """Share of the learning rate that a parameter of this name gets."""
    after_backward: Callable[[Batch], None] | None = None
    """May add gradients, as adversarial training does."""


@dataclass
class Position:
    """Where a training run stands; what cannot be computed again from the params."""

    round: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_score: float | None = None
    best_round: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One training run of a model; `train` is the way to use it."""

    def __init__(self, model: nn.Module, recipe: Recipe, run: StageRun, phase: str):
        self.model, self.recipe, self.run = model, recipe, run
        self.folder = run.state / phase
        precision = {"fp32": "no", "bf16": "bf16"}[recipe.optimizer.precision]
        self.accelerator = Accelerator(mixed_precision=precision)
        self.model.to(self.accelerator.device)
        self.steps = sum(len(recipe.batches(index)) for index in range(recipe.rounds))
        self.optimizer = _build_optimizer(model, recipe)
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.phase = phase
        self._saved_at = time.monotonic()

    def fit(self) -> Position:
        """Train to the end, from the saved state where there is one."""
        self._restore()
        with _interruptible() as interrupted:
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

    def _train_round(self, interrupted: threading.Event) -> None:
        position = self.position
        batches = self.recipe.batches(position.round)
        waiting = batches[position.batch :]
        description = f"{self.run.name} {self.phase} round {position.round + 1}/{self.recipe.rounds}"
        self.model.train()
        for batch in track(waiting, description):
            self._step(batch)
            position.batch += 1
            self._save_if(interrupted.is_set() or self._save_is_due())
            if interrupted.is_set():
                raise KeyboardInterrupt

    def _step(self, batch: Batch) -> None:
        position = self.position
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():
            loss = self.recipe.loss(batch)
        self.accelerator.backward(loss)
        if self.recipe.after_backward is not None:
            self.recipe.after_backward(batch)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.maximum_gradient_norm)
        self.optimizer.step()
        value = loss.item()
        if value != value:
            raise FloatingPointError(f"{self.run.name}: the loss is not a number at step {position.step}")
        position.step += 1
        position.loss_sum += value
        position.loss_count += 1
        if position.step % _STEPS_BETWEEN_LIVE_POINTS == 0:
            self.run.record.log(position.step, {f"{self.phase}_batch_loss": value})

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
        """Rise linearly over the warm-up, then fall linearly to zero."""
        warmup = max(1, round(self.recipe.optimizer.warmup_fraction * self.steps))
        rise, fall = (step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup)
        return self.recipe.optimizer.learning_rate * max(0.0, min(1.0, rise, fall))

    def _set_learning_rate(self) -> None:
        rate = self._learning_rate(self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES

    def _save_if(self, wanted: bool) -> None:
        if not wanted:
            return
        draft = self.folder.with_name(f"{self.folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tensors = {"generator": torch.get_rng_state()}
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in entry.items()}
        safetensors.torch.save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, draft / "state.safetensors"
        )
        write_json(draft / "position.json", vars(self.position))
        write_manifest(draft)
        publish(draft, self.folder)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        if not self.folder.exists():
            return
        verify(self.folder)
        tensors = safetensors.torch.load_file(self.folder / "state.safetensors")
        self.position = Position(**read_json(self.folder / "position.json"))
        self.model.load_state_dict(_below("model/", tensors))
        self.best = _below("best/", tensors)
        state = self.optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer/", tensors).items():
            index, _, key = name.partition("/")
            entries.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**state, "state": entries})
        torch.set_rng_state(tensors["generator"])
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
    return Trainer(model, recipe, run, phase).fit()


def _build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """One group a parameter; biases and norms are not decayed, as in BERT's own optimizer."""
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter],
            "scale": recipe.learning_rate_scale(name),
            "weight_decay": recipe.optimizer.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=recipe.optimizer.learning_rate, fused=True)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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

"""A tiny training problem whose steps can be made to go wrong, and a stage's run without a stage."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import nn

from stages.core.params import FaultParams, OptimizerParams, SaveParams, ScheduleParams, load_params
from stages.core.training.loop import Trainer
from stages.core.training.recipe import Batch, Recipe, Tensors

OPTIMIZER = OptimizerParams(
    kind="adamw",
    betas=[0.9, 0.999],
    batch_tokens=4,
    learning_rate=0.05,
    weight_decay=0.01,
    schedule=ScheduleParams(kind="linear", warmup=0.1),
    maximum_gradient_norm=1.0,
    precision="fp32",
    averaging=None,
)
PARAMS = load_params(Path(__file__).parents[4] / "presets" / "tiny.yaml")
TRAINING = PARAMS.training
SAVES: dict[str, Any] = {"seconds": 60.0, "steps": None, "keep": 2}
FAULTS: dict[str, Any] = {"spike": None, "window": 5, "skips": 2, "rollbacks": 2, "rate_factor": 0.5}
ROUNDS, BATCHES = 3, 10
BETAS: dict[str, list[float]] = {
    "sgd": [0.9],
    "adam": [0.9, 0.999],
    "adamw": [0.9, 0.999],
    "adabelief": [0.9, 0.999],
    "adafactor": [],
    "lion": [0.9, 0.99],
    "muon": [0.95, 0.9, 0.999],
}
"""What each kind of optimizer takes."""


class FakeRun:
    """A stage's run without a stage."""

    def __init__(self, state: Path, saves: dict[str, Any] | None = None, faults: dict[str, Any] | None = None):
        self.name, self.state = "test", state
        self.said: list[str] = []
        self.record = SimpleNamespace(log=lambda step, values: None)
        training = TRAINING.model_copy(update={"faults": FaultParams(**FAULTS | (faults or {}))})
        self.params = SimpleNamespace(saves=SaveParams(**SAVES | (saves or {})), training=training)

    def log(self, step: int, **values: float) -> None:
        pass

    def say(self, message: str) -> None:
        if not message.startswith("fit epoch"):
            self.said.append(message)


class Problem:
    """A noisy line to fit: 3 rounds of 10 batches of 4, with dropout and with noise from every generator."""

    def __init__(self, noise: bool = True) -> None:
        torch.manual_seed(3)
        self.inputs = torch.randn(40, 3)
        self.targets = self.inputs @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(40)
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        self.noise = noise
        self.model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2 * noise), nn.Tanh(), nn.Linear(16, 1))
        self.calls = 0
        self.before: Callable[[int, Tensors], None] = lambda call, tensors: None
        """Called with the number of the call, from 1, and the micro-batch."""
        self.trainer: Any = None

    def batches(self, index: int) -> list[list[int]]:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(index)).tolist()
        return [order[start : start + 4] for start in range(0, 40, 4)]

    def prepare(self, batch: Batch) -> Tensors:
        rows = torch.tensor(list(batch))
        return {"inputs": self.inputs[rows], "targets": self.targets[rows]}

    def loss(self, tensors: Tensors) -> torch.Tensor:
        self.calls += 1
        self.before(self.calls, tensors)
        drawn = random.random() + numpy.random.random() if self.noise else 1.0
        return (self.model(tensors["inputs"]).squeeze(-1) - tensors["targets"]).square().mean() * drawn

    def evaluate(self) -> tuple[float, dict[str, float]]:
        return 0.0, {}

    def fit(self, run: FakeRun, **changes: Any) -> torch.Tensor:
        """Train, and return all weights as one vector."""
        settings: dict[str, Any] = {"optimizer": OPTIMIZER, "rounds": ROUNDS, "keep_best": False, **changes}
        recipe = Recipe(batches=self.batches, prepare=self.prepare, loss=self.loss, evaluate=self.evaluate, **settings)
        self.trainer = Trainer(self.model, recipe, run, "fit")  # type: ignore[arg-type]
        self.trainer.fit()
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def interrupt_at(call: int) -> Callable[[int, Tensors], None]:
    """Make a problem raise in the middle of a step, as a fault that nobody foresaw."""

    def before(number: int, tensors: Tensors) -> None:
        if number == call:
            raise InterruptedFitError

    return before


class InterruptedFitError(Exception):
    """Nothing catches it."""

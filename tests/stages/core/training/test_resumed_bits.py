"""A run that was interrupted ends with the bits of an unbroken one: with every optimizer, in fp16, with averaging."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_problem import BETAS

from stages.core.params import OptimizerParams, load_params
from stages.core.training.loop import Trainer
from stages.core.training.recipe import Batch, Position, Recipe, Tensors

TINY = load_params(Path(__file__).parents[4] / "presets" / "tiny.yaml")
TEXTS, BATCH, ROUNDS = 32, 8, 3
OVERFLOW_AT = 2
"""Position of a micro-batch, counted from 1, whose loss is far too large for the first scale of fp16."""


class Task:
    """Rows to tell apart by a network with an embedding that its head shares, dropout, and a frozen layer."""

    def __init__(self, optimizer: OptimizerParams, folder: Path):
        torch.manual_seed(3)
        self.rows, self.targets = torch.randint(0, 12, (TEXTS, 4)), torch.randint(0, 12, (TEXTS,))
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embedding = nn.Embedding(12, 8)
        self.model.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.model.layers = nn.ModuleList([nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 8)])
        self.model.head = nn.Linear(8, 12)
        self.model.head.weight = self.model.embedding.weight
        self.optimizer, self.folder = optimizer, folder
        self.calls, self.interrupt_at = 0, -1
        self.trail: list[Tensor] = []
        """Weights before each step."""
        self.judged: list[Tensor] = []

    def batches(self, index: int) -> list[list[int]]:
        order = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(index)).tolist()
        return [order[start : start + BATCH] for start in range(0, TEXTS, BATCH)]

    def prepare(self, batch: Batch) -> Tensors:
        return {"rows": self.rows[list(batch)], "targets": self.targets[list(batch)]}

    def loss(self, tensors: Tensors) -> Tensor:
        self.calls += 1
        self.trail.append(weights_of(self.model))
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        hidden = self.model.frozen(self.model.embedding(tensors["rows"]).mean(1))
        for layer in self.model.layers:
            hidden = layer(hidden)
        loss = nn.functional.cross_entropy(self.model.head(hidden).float(), tensors["targets"])
        overflows = self.optimizer.precision == "fp16" and self.calls == OVERFLOW_AT
        return loss * (1e38 if overflows else 1.0)

    def position_of(self, tensors: Tensors) -> int:
        """Which batch of its round these tensors are."""
        for index in range(ROUNDS):
            for place, batch in enumerate(self.batches(index)):
                if torch.equal(self.rows[batch], tensors["rows"]):
                    return place
        return -1

    def evaluate(self) -> tuple[float, dict[str, float]]:
        self.judged.append(weights_of(self.model))
        return float(len(self.judged)), {}

    def fit(self, **changes: Any) -> Position:
        run = SimpleNamespace(
            name="test",
            state=self.folder,
            record=SimpleNamespace(log=lambda step, values: None),
            params=TINY,
            log=lambda step, **values: None,
            say=lambda message: None,
        )
        recipe = Recipe(
            optimizer=self.optimizer,
            rounds=ROUNDS,
            batches=self.batches,
            prepare=self.prepare,
            loss=self.loss,
            evaluate=self.evaluate,
            **changes,
        )
        torch.manual_seed(1)
        self.trainer = Trainer(self.model, recipe, run, "fit")  # type: ignore[arg-type]
        return self.trainer.fit()


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def optimizer(kind: str, precision: str = "fp32", averaging: float | None = None) -> OptimizerParams:
    changes = {"kind": kind, "betas": BETAS[kind], "precision": precision, "averaging": averaging}
    return TINY.finetune.optimizer.model_copy(update={"learning_rate": 0.02, **changes})


@pytest.mark.parametrize("precision, averaging", [("fp32", None), ("fp16", 0.9), ("bf16", 0.9)])
@pytest.mark.parametrize("kind", BETAS)
def test_interrupted_and_resumed(kind: str, precision: str, averaging: float | None, tmp_path: Path) -> None:
    whole = Task(optimizer(kind, precision, averaging), tmp_path / "whole")
    whole.fit()
    broken = Task(whole.optimizer, tmp_path / "broken")
    broken.interrupt_at = 6
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = Task(whole.optimizer, tmp_path / "broken")
    resumed.calls = 6
    resumed.fit()
    assert resumed.calls == whole.calls == ROUNDS * TEXTS // BATCH
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.model.head.weight is resumed.model.embedding.weight
    if precision == "fp16":  # the scale that the overflow halved has come along
        scaler = resumed.trainer.scaler.state_dict()
        assert scaler["scale"] == 65536.0 / 2
        assert scaler["_growth_tracker"] == ROUNDS * TEXTS // BATCH - OVERFLOW_AT


@pytest.mark.parametrize("keep_best", [True, False])
def test_what_is_judged_and_kept_is_the_average(keep_best: bool, tmp_path: Path) -> None:
    plain, averaged = (Task(optimizer("adamw", "fp32", decay), tmp_path / str(decay)) for decay in (None, 0.9))
    plain.fit(keep_best=keep_best)
    averaged.fit(keep_best=keep_best)
    # Training itself goes on from the weights, which the average never touches.
    assert all(torch.equal(*pair) for pair in zip(plain.trail, averaged.trail, strict=True))
    mean, means = plain.trail[0], []
    for step, weights in enumerate(plain.trail[1:], 1):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights
        means.append(mean)
    rounds = zip(averaged.judged, means[TEXTS // BATCH - 1 :: TEXTS // BATCH], strict=False)
    for judged, expected in rounds:
        torch.testing.assert_close(judged, expected)
    assert torch.equal(weights_of(averaged.model), averaged.judged[-1])
    again = Task(averaged.optimizer, averaged.folder)
    again.fit(keep_best=keep_best)  # from the state of a finished run
    assert again.calls == 0
    assert torch.equal(weights_of(again.model), averaged.judged[-1])


def test_nothing_follows_a_step_that_the_scaler_left_out(tmp_path: Path) -> None:
    followed: list[int] = []
    Task(optimizer("adamw", "fp16", 0.9), tmp_path).fit(after_step=followed.append)
    assert followed == [step for step in range(1, ROUNDS * TEXTS // BATCH + 1) if step != OVERFLOW_AT]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_without_a_label_is_passed_over(precision: str, tmp_path: Path) -> None:
    task = Task(optimizer("adamw", precision), tmp_path)
    position = task.fit(weight=lambda tensors: float(task.position_of(tensors) != 3))
    assert position.step == ROUNDS * TEXTS // BATCH
    assert task.calls == position.step - ROUNDS  # one of each round's batches

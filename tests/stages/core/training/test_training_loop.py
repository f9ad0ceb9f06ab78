"""The training loop on a tiny problem; above all, that an interrupted run ends where an unbroken one does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_problem
from torch import nn
from training_problem import OPTIMIZER, TRAINING

from stages.core.params import FaultParams, SaveParams
from stages.core.training.loop import train
from stages.core.training.recipe import Position, Recipe, Tensors

SAVES = SaveParams(seconds=60.0, steps=None, keep=2)
FAULTS = FaultParams(spike=10.0, window=32, skips=3, rollbacks=3, rate_factor=0.5)


class FakeRun:
    """A stage's run without a stage."""

    def __init__(self, state: Path, saves: SaveParams = SAVES, faults: FaultParams = FAULTS):
        self.name, self.state = "test", state
        self.points: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []
        self.record = SimpleNamespace(log=lambda step, values: None)
        self.params = SimpleNamespace(saves=saves, training=TRAINING.model_copy(update={"faults": faults}))

    def log(self, step: int, **values: float) -> None:
        self.points.append((step, values))

    def say(self, message: str) -> None:
        self.said.append(message)


class Problem(training_problem.Problem):
    """The line to fit with dropout as its only noise; it can be interrupted, and is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.interrupt_at: int | None = None

    def loss(self, tensors: Tensors) -> torch.Tensor:
        self.steps += 1
        if self.steps == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return (self.model(tensors["inputs"]).squeeze(-1) - tensors["targets"]).square().mean()

    def evaluate(self) -> tuple[float, dict[str, float]]:
        with torch.no_grad():
            loss = float((self.model(self.inputs).squeeze(-1) - self.targets).square().mean())
        return -loss, {"validation_loss": loss}

    def fit(self, run: FakeRun, **changes: Any) -> Position:  # type: ignore[override]
        settings: dict[str, Any] = {"optimizer": OPTIMIZER, "rounds": 4, **changes}
        recipe = Recipe(batches=self.batches, prepare=self.prepare, loss=self.loss, evaluate=self.evaluate, **settings)
        return train(self.model, recipe, run, "fit")  # type: ignore[arg-type]


def _weights(problem: Problem) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])


def test_it_learns_and_reports(tmp_path: Path) -> None:
    problem, run = Problem(), FakeRun(tmp_path)
    before = problem.evaluate()[1]["validation_loss"]
    position = problem.fit(run)
    assert problem.evaluate()[1]["validation_loss"] < 0.5 * before
    assert [step for step, _ in run.points] == [10, 20, 30, 40]
    assert set(run.points[0][1]) == {"epoch", "train_loss", "validation_loss", "learning_rate"}
    assert position.round == 4
    assert not problem.model.training


@pytest.mark.parametrize("interrupt_at", [1, 7, 10, 11, 25, 40])
def test_an_interrupted_run_ends_with_the_same_bits(interrupt_at: int, tmp_path: Path) -> None:
    whole = Problem()
    whole_run = FakeRun(tmp_path / "whole")
    whole.fit(whole_run)
    broken = Problem()
    broken.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        broken.fit(FakeRun(tmp_path / "broken"))
    resumed, resumed_run = Problem(), FakeRun(tmp_path / "broken")
    resumed.fit(resumed_run)
    assert resumed.steps == 40 - interrupt_at
    assert torch.equal(_weights(resumed), _weights(whole))
    assert resumed_run.points == whole_run.points


def test_twice_the_same_bits(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "other"):
        problem = Problem()  # seeds the generator
        problem.fit(FakeRun(tmp_path / name))
        weights.append(_weights(problem))
    assert torch.equal(*weights)


def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    first, second = Problem(), Problem()
    first.fit(FakeRun(tmp_path))
    second.fit(FakeRun(tmp_path))
    assert second.steps == 0
    assert torch.equal(_weights(first), _weights(second))


def test_patience_stops_and_the_best_round_is_kept(tmp_path: Path) -> None:
    problem = Problem()
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    kept: list[torch.Tensor] = []

    def evaluate() -> tuple[float, dict[str, float]]:
        kept.append(_weights(problem))
        return next(scores), {}

    problem.evaluate = evaluate  # type: ignore[method-assign]
    position = problem.fit(FakeRun(tmp_path), rounds=5, patience=2)
    assert (position.round, position.best_round) == (4, 1)
    assert torch.equal(_weights(problem), kept[1])


def test_without_keep_best_the_last_weights_stay(tmp_path: Path) -> None:
    problem, last = Problem(), []

    def evaluate() -> tuple[float, dict[str, float]]:
        last.append(_weights(problem))
        return -float(len(last)), {}

    problem.evaluate = evaluate  # type: ignore[method-assign]
    problem.fit(FakeRun(tmp_path), keep_best=False)
    assert torch.equal(_weights(problem), last[-1])


def test_the_learning_rate_warms_up_and_falls(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    Problem().fit(run)
    rates = [values["learning_rate"] for _, values in run.points]
    # 40 steps, 4 of them warm-up: after step 10, 31 of 36 falling steps are left.
    assert rates == pytest.approx([0.05 * 31 / 36, 0.05 * 21 / 36, 0.05 * 11 / 36, 0.05 * 1 / 36])


def test_a_scale_of_zero_freezes_a_parameter(tmp_path: Path) -> None:
    problem = Problem()
    before = problem.model[0].weight.detach().clone()
    optimizer = OPTIMIZER.model_copy(update={"weight_decay": 0.0})
    problem.fit(FakeRun(tmp_path), optimizer=optimizer, learning_rate_scale=lambda name: float(name != "0.weight"))
    assert torch.equal(problem.model[0].weight, before)


def test_an_adversary_computes_the_gradients_of_a_batch_in_shares(tmp_path: Path) -> None:
    problems, runs = (Problem(), Problem()), (FakeRun(tmp_path / "one"), FakeRun(tmp_path / "other"))
    adversaries = (None, lambda backward: backward(0.25) + backward(0.75))
    for problem, run, adversary in zip(problems, runs, adversaries, strict=True):
        problem.model[1] = nn.Dropout(0.0)  # so that two passes see the same
        problem.fit(run, adversary=adversary)
    torch.testing.assert_close(_weights(problems[1]), _weights(problems[0]), rtol=1e-3, atol=1e-5)
    assert problems[1].steps == 2 * problems[0].steps
    for one, other in zip(runs[0].points, runs[1].points, strict=True):
        assert other[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=1e-4)

"""A compiled loss trains, saves and goes on as an uncompiled one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_problem import OPTIMIZER, PARAMS, TRAINING

from stages.core.params import SaveParams
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
EVERY_STEP = SaveParams(seconds=0.0, steps=None, keep=1)


class FakeRun:
    """A stage's run without a stage."""

    def __init__(self, state: Path, compiled: bool):
        self.name, self.state = "test", state
        self.live: dict[str, float] = {}
        self.said: list[str] = []
        self.record = SimpleNamespace(log=lambda step, values: self.live.update(values))
        self.params = SimpleNamespace(saves=PARAMS.saves, training=TRAINING.model_copy(update={"compile": compiled}))

    def log(self, step: int, **values: float) -> None:
        """Keep no curves."""

    def say(self, message: str) -> None:
        self.said.append(message)


def _fit(run: FakeRun, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(24, 3)
    rounds = 0

    def prepare(batch: Batch) -> Tensors:
        return {"inputs": inputs[list(batch)]}

    def loss(tensors: Tensors) -> torch.Tensor:
        return (model(tensors["inputs"]).squeeze(-1) - tensors["inputs"].sum(1)).square().mean()

    def evaluate() -> tuple[float, dict[str, float]]:
        nonlocal rounds
        rounds += 1
        if rounds == stop_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            return -float(loss(prepare(range(7)))), {}  # a shape that training never saw

    recipe = Recipe(
        optimizer=OPTIMIZER,
        rounds=3,
        batches=lambda index: [range(0, 8), range(8, 13), range(13, 24)],
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
    )
    train(model, recipe, run, "fit")  # type: ignore[arg-type]
    assert not any("_orig_mod" in name for name in model.state_dict())
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_compiled_resumes_with_the_same_bits_and_reports(tmp_path: Path) -> None:
    whole = FakeRun(tmp_path / "whole", True)
    wanted = _fit(whole)
    assert {"fit_compile_seconds", "fit_eager_steps", "fit_compiled_steps"} <= set(whole.live)
    assert "compiled in" in whole.said[0]
    # chance falls elsewhere than uncompiled, but the same line is learned
    torch.testing.assert_close(wanted, _fit(FakeRun(tmp_path / "eager", False)), atol=0.2, rtol=0.5)
    broken = FakeRun(tmp_path / "broken", True)
    broken.params.saves = SaveParams(seconds=0.0, steps=None, keep=1)
    with pytest.raises(KeyboardInterrupt):
        _fit(broken, stop_at=2)
    assert torch.equal(_fit(FakeRun(tmp_path / "broken", True)), wanted)

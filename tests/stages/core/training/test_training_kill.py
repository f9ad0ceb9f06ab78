"""Real stages killed ten times over end with the same weights as when nobody touches them."""

from __future__ import annotations

import copy
import itertools
import os
import random
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from training_forks import FORKS

from stages.core.artifacts import file_sha256, write_manifest
from stages.core.stage import EXIT_INTERRUPTED

TINY = yaml.safe_load((Path(__file__).parents[4] / "presets" / "tiny.yaml").read_text())
KILLS = 10
MOST_STEPS_BETWEEN_KILLS = 6
INPUTS = {
    "pretrain": ("checkpoint", "tokenizer", "blocks"),
    "finetune": ("model", "data", "corpus"),
    "distill": ("teacher", "data", "corpus", "language_model"),
}


def _params() -> dict[str, Any]:
    """Over 70 steps in every stage, so that ten kills come before the end."""
    raw = copy.deepcopy(TINY)
    raw["pretrain"] |= {"steps": 78, "evaluations": 3}
    raw["pretrain"]["optimizer"]["batch_tokens"] = 64
    raw["finetune"] |= {"epochs": 7, "patience": 7, "adversarial": {"kind": "fgm", "epsilon": 0.5}}
    raw["finetune"]["optimizer"]["batch_tokens"] = 64
    raw["distill"] |= {"epochs": 4, "weights": {**raw["distill"]["weights"], "hidden": 0.5, "relations": 1.0}}
    raw["distill"] |= {"student": {"kind": "layers", "layers": [0, 1]}, "relations": {"layer": 1, "heads": 4}}
    raw["distill"]["optimizer"]["batch_tokens"] = 64
    return raw


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    texts, rows = [f"where is the {word} ?" for word in ("town", "hill", "bird")], []
    for name in ("train", "validation", "test"):
        rows += pandas.read_parquet(tiny_data / f"{name}.parquet")["input_ids"].tolist()
    ids = list(itertools.chain.from_iterable(rows))
    blocks = pandas.DataFrame({"input_ids": [ids[start : start + 16] for start in range(0, len(ids) - 16, 16)]})
    for name in ("blocks", "corpus"):
        (root / name).mkdir()
    blocks[8:].to_parquet(root / "blocks" / "train.parquet", index=False)
    blocks[:8].to_parquet(root / "blocks" / "heldout.parquet", index=False)
    pandas.DataFrame({"text": texts}).to_parquet(root / "corpus" / "corpus.parquet")
    shutil.copytree(tiny_data / "tokenizer", root / "tokenizer")
    for name in ("blocks", "corpus", "tokenizer"):
        write_manifest(root / name)
    return {
        "checkpoint": tiny_checkpoint,
        "model": tiny_checkpoint,
        "teacher": tiny_checkpoint,
        "language_model": tiny_checkpoint,
        "data": tiny_data,
        **{name: root / name for name in ("blocks", "corpus", "tokenizer")},
    }


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _plan_kill(kind: str, seed: int) -> None:
    """Make this process kill itself: before a step, at some moment of the training, or when a save is not yet renamed.

    The kernel ends it as it would for anybody else's SIGKILL: no handler, no `finally`, no flush. "politely" is what
    Ctrl-C and a shutdown do.
    """
    from stages.core.training import loop, state

    generator = random.Random(seed)
    last = generator.randint(2, MOST_STEPS_BETWEEN_KILLS) if kind == "step" else MOST_STEPS_BETWEEN_KILLS
    taken = itertools.count()
    real_step, real_publish = loop.Trainer._step, state.publish

    def step(self: Any, *arguments: Any) -> None:
        number = next(taken)
        if kind == "moment" and number == 0:
            threading.Timer(generator.uniform(0.0, 0.15), _kill).start()
        if number == last and kind == "politely":
            os.kill(os.getpid(), signal.SIGTERM)
        elif number == last:
            _kill()
        real_step(self, *arguments)

    saves = itertools.count()
    fatal = generator.randint(0, 2)

    def publish(draft: Path, target: Path) -> None:
        if kind == "save" and next(saves) == fatal:
            _kill()
        real_publish(draft, target)

    loop.Trainer._step, state.publish = step, publish  # type: ignore[method-assign, assignment]


def _run_stage(folder: Path, stage: str, inputs: dict[str, Path], kind: str | None, seed: int) -> None:
    """Do in a forked process what `python -m stages.STAGE` does."""
    from stages.core.observe import tracking

    os.chdir(folder)
    os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    tracking._keep_mirrored = lambda *_: None  # MLflow takes seconds to load and has no part in this
    if kind is not None:
        _plan_kill(kind, seed)
    options = [word for role in INPUTS[stage] for word in (f"--{role}", str(inputs[role]))]
    sys.argv = [f"stages.{stage}", *options, "--out", "artifacts/out"]
    runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)


def _run(folder: Path, stage: str, inputs: dict[str, Path], kind: str | None = None, seed: int = 0) -> int | None:
    process = FORKS.Process(target=_run_stage, args=(folder, stage, inputs, kind, seed))
    process.start()
    process.join(120)
    return process.exitcode


def _folder(root: Path, saves: dict[str, Any]) -> Path:
    raw = _params()
    raw["saves"] = saves
    root.mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return root


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "distill"])
def test_killed_ten_times_and_stopped_once_it_ends_with_the_same_weights(
    stage: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    untouched = _folder(tmp_path / "untouched", {"seconds": 60.0, "steps": None, "keep": 1})
    killed = _folder(tmp_path / "killed", {"seconds": 60.0, "steps": 2, "keep": 2})
    assert _run(untouched, stage, inputs) == 0, (untouched / "log.txt").read_text()
    generator = random.Random(f"{stage} kills")
    for seed in range(KILLS):
        kind = generator.choice(["step", "moment", "save"])
        assert _run(killed, stage, inputs, kind, seed) == -signal.SIGKILL
        assert not (killed / "artifacts" / "out").exists()
    assert _run(killed, stage, inputs, "politely", KILLS) == EXIT_INTERRUPTED
    assert _run(killed, stage, inputs) == 0
    assert f"{stage} goes on from step" in (killed / "log.txt").read_text()
    for name in ("model/model.safetensors", "history.csv"):
        same = [file_sha256(folder / "artifacts" / "out" / name) for folder in (untouched, killed)]
        assert same[0] == same[1], name

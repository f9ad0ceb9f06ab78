"""Headroom's side: the stages' own commands, run in a folder that is laid out as a checkout is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from torch import nn

from benchmarks.methods.declared import changed
from benchmarks.training.watch import Watch
from benchmarks.workers import ROOT
from stages.core.artifacts import STATE
from stages.core.observe.tracking import MIRRORED_VARIABLE
from stages.core.training import loop
from stages.core.training.recipe import Position, Recipe


def train_stage(stage: str, folder: Path, seed: int, watch: Watch, compiled: bool = False) -> None:
    """Run a stage with its training watched; ends with `Enough` unless the stage trains less than was asked.

    Args:
        stage: of `dvc.yaml`.
        folder: to run in.
        seed: put into the params file.
        watch: of its training.
        compiled: whether its loss is compiled.
    """
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params = changed(params, {"seed": seed, "training.compile": compiled})
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    shutil.rmtree(folder / STATE, ignore_errors=True)  # a state saved by an earlier round would be taken up again
    train = loop.train

    def watched(model: nn.Module, recipe: Recipe, run: Any, phase: str) -> Position:
        def evaluate() -> tuple[float, dict[str, float]]:
            with watch.paused():
                return recipe.evaluate()

        with watch.watching(model):
            return train(model, dataclasses.replace(recipe, evaluate=evaluate), run, phase)

    # As under the flow, which tells MLflow of the run; the Trainer reports to nobody.
    with patch.object(loop, "train", watched), patch.dict(os.environ, {MIRRORED_VARIABLE: "1"}):
        run_stage(stage, folder)


def run_stage(stage: str, folder: Path) -> None:
    """Run the command that `dvc.yaml` has for a stage, in this process.

    Raises:
        SystemExit: if it fails; it has said why.
    """
    module, *arguments = stage_command(stage)
    with patch.object(sys, "argv", [module, *arguments]), _inside(folder):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


def stage_command(stage: str) -> list[str]:
    """The module and the arguments of a stage."""
    command = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["cmd"]
    python, flag, *rest = shlex.split(command)
    if (python, flag) != ("python", "-m"):
        raise ValueError(f"dvc.yaml: {stage}: the command is no `python -m`")
    return rest


@contextlib.contextmanager
def _inside(folder: Path) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

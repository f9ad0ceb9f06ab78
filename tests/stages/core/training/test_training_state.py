"""Saved states: whole or absent, the last few kept, and exact."""

from __future__ import annotations

import errno
import gc
import os
import random
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from training_problem import FakeRun, InterruptedFitError, Problem, interrupt_at

from stages.core.artifacts import publish, read_json, write_json, write_manifest
from stages.core.tensors import shuffled_batches
from stages.core.training import state as state_module
from stages.core.training.generators import Generators
from stages.core.training.recipe import Faults, Position
from stages.core.training.state import SavedStates

EVERY_STEP = {"steps": 1, "keep": 3}


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("fit/state-*"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return Problem().fit(FakeRun(tmp_path_factory.mktemp("unbroken")))


@pytest.mark.parametrize("step", [1, 7, 10, 11, 29])
def test_a_run_that_died_goes_on_with_the_generators_of_every_library(
    step: int, unbroken: torch.Tensor, tmp_path: Path
) -> None:
    dying = Problem()
    dying.before = interrupt_at(step + 1)
    with pytest.raises(InterruptedFitError):
        dying.fit(FakeRun(tmp_path, EVERY_STEP))
    again, run = Problem(), FakeRun(tmp_path, EVERY_STEP)
    assert torch.equal(again.fit(run), unbroken)
    assert again.calls == 30 - step
    assert run.said == [f"fit goes on from step {step}"]


def test_the_last_few_states_are_kept(tmp_path: Path) -> None:
    Problem().fit(FakeRun(tmp_path, {"steps": 7, "keep": 3}))
    # The first at step 0, then those of 7, 14, 21 and 28, and the last one at the end.
    assert [path.name for path in _states(tmp_path)] == ["state-00000004", "state-00000005", "state-00000006"]
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    assert len(list((tmp_path / "fit").iterdir())) == 3


@pytest.mark.parametrize("damage", ["altered", "half", "no manifest"])
def test_a_damaged_state_is_said_and_the_one_before_counts(damage: str, unbroken: torch.Tensor, tmp_path: Path) -> None:
    dying = Problem()
    dying.before = interrupt_at(9)
    with pytest.raises(InterruptedFitError):
        dying.fit(FakeRun(tmp_path, EVERY_STEP))
    newest = _states(tmp_path)[-1]
    tensors = newest / "state.safetensors"
    if damage == "altered":
        whole = bytearray(tensors.read_bytes())
        whole[-1] ^= 1
        tensors.write_bytes(whole)
    elif damage == "half":
        os.truncate(tensors, tensors.stat().st_size // 2)
    else:
        (newest / "manifest.json").unlink()
    again, run = Problem(), FakeRun(tmp_path, EVERY_STEP)
    assert torch.equal(again.fit(run), unbroken)
    assert run.said[0].startswith(f"fit a saved state is damaged and left out, the one before it counts ({newest}")
    assert run.said[1:] == ["fit goes on from step 7"]


def test_a_full_disk_leaves_the_last_state_and_the_training_alone(
    unbroken: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = state_module._write_files, 0

    def write(folder: Path, values: Any, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        real(folder, values, tensors)
        if 3 <= calls <= 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_module, "_write_files", write)
    run, problem = FakeRun(tmp_path, EVERY_STEP), Problem()
    problem.before = interrupt_at(6)
    with pytest.raises(InterruptedFitError):
        problem.fit(run)
    assert [read_json(path / "state.json")["pairs"][0][1]["pairs"][2] for path in _states(tmp_path)] == [
        ["step", 0],
        ["step", 1],
    ]
    standing = _states(tmp_path)[-1]
    assert run.said == [
        f"fit the disk is full, so the state could not be saved; the one in {standing} stands, "
        "training goes on and tries again"
    ]
    assert not (tmp_path / "fit" / ".draft").exists()
    again = FakeRun(tmp_path, EVERY_STEP)
    assert torch.equal(Problem().fit(again), unbroken)
    assert again.said == ["fit goes on from step 1"]
    assert calls > 6


def test_any_other_failure_to_save_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, values: Any, tensors: dict[str, torch.Tensor]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(state_module, "_write_files", write)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Problem().fit(FakeRun(tmp_path, EVERY_STEP))


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    dying = Problem()
    dying.before = interrupt_at(6)
    with pytest.raises(InterruptedFitError):
        dying.fit(FakeRun(tmp_path, EVERY_STEP))
    newest = _states(tmp_path)[-1]
    written = read_json(newest / "state.json")
    position = dict(next(pair for pair in written["pairs"] if pair[0] == "position")[1]["pairs"])
    position["processes"]["pairs"].append(["data", 2])
    write_json(newest / "state.json", written)
    write_manifest(newest)
    run, again = FakeRun(tmp_path, EVERY_STEP), Problem()
    again.fit(run)
    assert again.calls == 25
    assert run.said == [
        "fit goes on from step 5",
        "fit was saved by data 2 and goes on with one process: the batches stay as they are, but sums run in another "
        "order and dropout is drawn anew, so the weights will not be those of an unbroken run to the last bit",
    ]


class Odd:
    """A part with everything that a state may hold."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_every_kind_of_value_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"whole": torch.arange(6).reshape(2, 3).T, "half": torch.ones(2, dtype=torch.bfloat16)}
    state = {
        "state": {0: {"step": torch.tensor(7.0), **tensors}, 3: {}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 1 / 3], "params": [0, 1], "name": None, "fused": True}],
        "scale": float("inf"),
    }
    part = Odd(state)
    states, parts = SavedStates(tmp_path, 1, print), {"part": part}
    position = Position(step=5, history=[{"loss": 0.1}], faults=Faults(recent=[1 / 3], bad_batches=[[0, 1]]))
    states.save(position, {"weight": torch.tensor([1.0])}, parts)
    part.state = {}
    saved = states.restore(parts)
    assert saved is not None
    assert saved.position == position
    assert saved.best["weight"].tolist() == [1.0]
    back = part.state
    for name, tensor in tensors.items():
        assert torch.equal(back["state"][0].pop(name), tensor)
        state["state"][0].pop(name)
    assert back == state


def test_a_state_is_that_of_the_moment_of_its_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change while the state is still being written."""
    model = nn.Linear(2, 2)
    states, parts = SavedStates(tmp_path, 1, print), {"model": model}
    before = model.weight.detach().clone()

    def slow(draft: Path, target: Path) -> None:
        with torch.no_grad():
            model.weight.zero_()
        publish(draft, target)

    monkeypatch.setattr(state_module, "publish", slow)
    states.save(Position(), {}, parts)
    states.wait()
    assert not model.weight.any()
    states.restore(parts)
    assert torch.equal(model.weight, before)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(100, 100, bias=False), "other": nn.Linear(100, 100, bias=False)})
    model["other"].weight = model["one"].weight
    states, parts = SavedStates(tmp_path, 1, print), {"model": model}
    states.save(Position(), {}, parts)
    states.wait()
    assert next(tmp_path.glob("*/state.safetensors")).stat().st_size < 1.5 * 40_000


def test_nothing_holds_on_to_the_copies_of_a_written_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as the model and its optimizer, and must not wait for the garbage collector."""
    copies: list[weakref.ref[torch.Tensor]] = []
    real = state_module._write_files

    def write(folder: Path, values: Any, tensors: dict[str, torch.Tensor]) -> None:
        copies.extend(weakref.ref(tensor) for tensor in tensors.values())
        real(folder, values, tensors)

    monkeypatch.setattr(state_module, "_write_files", write)
    states, parts = SavedStates(tmp_path, 1, print), {"model": nn.Linear(2, 2)}
    gc.disable()
    try:
        states.save(Position(), {}, parts)
        states.wait()
        states.save(Position(), {}, parts)  # the writer lets go of its last work when it gets the next
        states.wait()
        assert len(copies) == 4
        assert [copy() for copy in copies[:2]] == [None, None]
    finally:
        gc.enable()


def test_generators_draw_the_same_again() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), numpy.random.random(), numpy.random.normal(), torch.rand(1).item()

    generators = Generators()
    draw()
    state = generators.state_dict()
    first = draw()
    generators.load_state_dict(state)
    assert draw() == first
    assert draw() != first


def test_the_order_of_the_data_is_a_function_of_seed_and_round_alone() -> None:
    lengths = numpy.random.default_rng(0).integers(3, 30, 200).tolist()
    first = shuffled_batches(lengths, 100, seed=17_000)
    torch.manual_seed(99)
    torch.rand(5)
    assert shuffled_batches(lengths, 100, seed=17_000) == first
    assert shuffled_batches(lengths, 100, seed=17_001) != first

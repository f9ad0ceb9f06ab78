from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from filelock import FileLock, Timeout

from stages.core import artifacts
from stages.core.artifacts import STATE, digest, verify, write_manifest
from stages.core.errors import UserError
from stages.core.observe.tracking import RUNS
from stages.core.params import Params, load_params
from stages.core.stage import StageRun, command, open_stage

REPOSITORY = Path(__file__).parents[3]
OUT = Path("artifacts/clean")
DATA = Path("artifacts/acquire/data")
Body = Callable[[StageRun], dict[str, Any]]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project folder with params and one input; MLflow is out of reach, which no stage may mind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("HEADROOM_EXECUTION", "test")
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    DATA.mkdir(parents=True)
    (DATA / "train.parquet").write_bytes(b"rows")
    write_manifest(DATA)
    polite_kill = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, polite_kill)


@pytest.fixture
def params() -> Params:
    return load_params(Path("params.yaml"))


def run_command(
    body: Body,
    *options: str,
    inputs: Sequence[str] = ("data",),
    variants: bool = False,
    optional: Sequence[str] = (),
) -> int:
    """Run a room's command line in this process; return its exit status."""
    given = options or ("--data", str(DATA), "--out", str(OUT))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["stages.clean", *given])
        command("clean", body, inputs, variants, optional)
    return int(ended.value.code or 0)


def write(text: str) -> Body:
    """A stage that writes a model and returns metrics."""

    def body(run: StageRun) -> dict[str, Any]:
        (run.unit("model") / "weights").write_text(text)
        return {"rows": len(text)}

    return body


def failing(problem: BaseException) -> Body:
    def body(run: StageRun) -> dict[str, Any]:
        (run.unit("model") / "weights").write_text("half writ")
        raise problem

    return body


def state_of_run(name: str = "clean") -> dict[str, Any]:
    """What the newest run of a stage left on record."""
    newest = max((RUNS / "test").glob(f"{name}-*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    return dict(json.loads(newest.read_text()))


def left_over() -> list[str]:
    return [path.name for path in (STATE / "staging").iterdir()]


def test_a_stage_publishes_units_metrics_measures_and_manifests() -> None:
    assert run_command(write("abc")) == 0
    verify(OUT)
    verify(OUT / "model")
    assert json.loads((OUT / "metrics.json").read_text()) == {"rows": 3}
    measured = json.loads((OUT / "measured.json").read_text())
    assert measured["inputs"] == {"data": digest(DATA)}
    assert measured["wall_seconds"] >= 0
    assert 1 < measured["peak_memory_mb"] < 100_000
    assert not (OUT / "history.csv").exists()
    assert left_over() == []
    assert state_of_run()["status"] == "FINISHED"
    assert state_of_run()["tags"]["headroom.output"] == digest(OUT)
    assert state_of_run()["tags"]["headroom.input.data"] == digest(DATA)


def test_an_input_that_the_graph_leaves_out_is_no_input() -> None:
    def body(run: StageRun) -> dict[str, Any]:
        return {"inputs": len(run.inputs)}

    given = ("--data", str(DATA), "--out", str(OUT))
    assert run_command(body, *given, optional=("corpus",)) == 0
    assert json.loads((OUT / "measured.json").read_text())["inputs"].keys() == {"data"}
    assert run_command(body, *given, "--corpus", str(DATA), optional=("corpus",)) == 0
    assert json.loads((OUT / "measured.json").read_text())["inputs"].keys() == {"data", "corpus"}


def test_curves_become_a_table_with_empty_cells_where_there_is_no_point() -> None:
    def body(run: StageRun) -> dict[str, Any]:
        run.log(1, train_loss=0.5)
        run.log(2, train_loss=0.25, validation_loss=0.75)
        return {}

    assert run_command(body) == 0
    with (OUT / "history.csv").open() as stream:
        assert list(csv.DictReader(stream)) == [
            {"step": "1", "train_loss": "0.5", "validation_loss": ""},
            {"step": "2", "train_loss": "0.25", "validation_loss": "0.75"},
        ]


def test_the_new_output_replaces_the_old_as_a_whole() -> None:
    def two_files(run: StageRun) -> dict[str, Any]:
        (run.staging / "only-in-the-first").write_text("x")
        return {}

    assert run_command(two_files) == 0
    assert run_command(write("abc")) == 0
    verify(OUT)
    assert not (OUT / "only-in-the-first").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda: shutil.rmtree(DATA), "artifacts/acquire/data: no such folder; run `dvc repro` to make it"),
        (lambda: (DATA / "train.parquet").write_bytes(b"ROWS"), "artifacts/acquire/data/train.parquet: was altered"),
        (lambda: (DATA / "train.parquet").unlink(), "artifacts/acquire/data/train.parquet: is missing"),
        (lambda: (DATA / "extra").write_bytes(b""), "artifacts/acquire/data/extra: is not in manifest.json"),
        (lambda: Path("params.yaml").unlink(), "params.yaml: no such file"),
        (lambda: Path("params.yaml").write_text("seed: x"), "params.yaml: seed: Input should be a valid integer"),
    ],
)
def test_a_bad_input_is_said_before_any_work(
    break_it: Callable[[], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it()

    def never(run: StageRun) -> dict[str, Any]:
        raise AssertionError("the stage began to work")

    assert run_command(never) == 2
    spoken = capsys.readouterr().err
    assert f"clean: {message}" in spoken
    assert "Traceback" not in spoken
    assert not OUT.exists()
    assert not RUNS.exists()


@pytest.mark.parametrize(
    ("problem", "status", "record"),
    [
        (UserError("first line\nsecond line"), 2, "FAILED"),
        (KeyboardInterrupt(), 130, "KILLED"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "FAILED"),
        (RuntimeError("while saving: I/O error: No space left on device (os error 28)"), 2, "FAILED"),
    ],
)
def test_a_stage_that_ends_early_leaves_the_old_output(
    problem: BaseException, status: int, record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(write("abc")) == 0
    before = digest(OUT)
    assert run_command(failing(problem)) == status
    verify(OUT)
    assert digest(OUT) == before
    assert left_over() == []
    assert state_of_run()["status"] == record
    assert "Traceback" not in capsys.readouterr().err


def test_each_line_of_a_users_mistake_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(UserError("first line\nsecond line"))) == 2
    assert "clean: first line\nclean: second line\n" in capsys.readouterr().err


def test_a_full_disk_found_on_the_way_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert "is full; free some space and run again, nothing was lost" in capsys.readouterr().err


def test_a_disk_that_is_nearly_full_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=10**12, free=5 * 2**20))
    assert run_command(write("abc")) == 2
    assert "artifacts: 5 MiB free on the disk, 256 MiB needed; free some space" in capsys.readouterr().err
    assert not OUT.exists()


@pytest.mark.parametrize("problem", [RuntimeError("a fault of ours"), OSError(errno.EIO, "Input/output error")])
def test_a_fault_of_ours_keeps_its_traceback_and_the_old_output(problem: Exception) -> None:
    assert run_command(write("abc")) == 0
    before = digest(OUT)
    with pytest.raises(type(problem)):
        run_and_raise(failing(problem))
    assert digest(OUT) == before
    assert state_of_run()["tags"]["headroom.error"].startswith(type(problem).__name__)


def run_and_raise(body: Body) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stages.clean", "--data", str(DATA), "--out", str(OUT)])
        command("clean", body, ["data"])


def test_metrics_that_are_no_numbers_are_refused_and_nothing_is_published() -> None:
    with pytest.raises(ValueError, match="JSON"):
        run_and_raise(lambda run: {"loss": float("nan")})
    assert not OUT.exists()


def test_a_disk_that_fills_up_while_publishing_leaves_the_old_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(write("abc")) == 0
    before = digest(OUT)

    def full(staging: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts, "_flush", full)
    assert run_command(write("xyz")) == 2
    assert digest(OUT) == before
    verify(OUT)


def test_a_second_run_over_the_same_output_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def body(run: StageRun) -> dict[str, Any]:
        assert run_command(write("other")) == 2
        return {"first": 1}

    assert run_command(body) == 0
    assert "artifacts/clean: another run is writing it; wait until it ends" in capsys.readouterr().err
    assert json.loads((OUT / "metrics.json").read_text()) == {"first": 1}


def test_stages_with_other_outputs_run_side_by_side(params: Params) -> None:
    first, second = Path("artifacts/a"), Path("artifacts/a-b")
    with open_stage("clean", params, {}, first) as one, open_stage("tokenize", params, {}, second) as other:
        (one.staging / "mine").write_text("one")
        (other.staging / "mine").write_text("other")
        write_manifest(one.staging)
        write_manifest(other.staging)
    verify(first)
    verify(second)
    assert [(folder / "mine").read_text() for folder in (first, second)] == ["one", "other"]


def test_an_absolute_output_is_locked_within_the_project(project: Path, params: Params) -> None:
    with open_stage("clean", params, {}, project / "artifacts/absolute") as run:
        (run.staging / "a").write_text("x")
        write_manifest(run.staging)
        assert len(list((project / STATE / "locks").iterdir())) == 1
    assert (project / "artifacts/absolute/a").exists()


def test_a_lock_that_the_stage_itself_waits_for_in_vain_is_not_taken_for_a_second_run(params: Params) -> None:
    held = FileLock("other.lock", timeout=0)
    with held, pytest.raises(Timeout), open_stage("clean", params, {}, OUT):
        FileLock("other.lock", timeout=0, is_singleton=False).acquire()


def test_what_killed_runs_left_is_cleared_away(params: Params) -> None:
    dead = STATE / "staging/clean-999999999"
    alive = STATE / f"staging/clean-{os.getppid()}"
    other = STATE / "staging/prune-999999999"
    for folder in (dead, alive, other):
        folder.mkdir(parents=True)
    assert run_command(write("abc")) == 0
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)


def test_a_publish_killed_between_its_renames_is_undone_at_the_next_start(params: Params) -> None:
    assert run_command(write("abc")) == 0
    before = digest(OUT)
    OUT.rename(OUT.with_name(".clean.retired"))
    assert run_command(failing(UserError("no"))) == 2
    assert digest(OUT) == before


def test_resume_state_outlives_a_failed_run_and_goes_with_a_finished_one() -> None:
    seen: list[bool] = []

    def body(run: StageRun) -> dict[str, Any]:
        seen.append((run.state / "step").exists())
        run.state.mkdir(parents=True, exist_ok=True)
        (run.state / "step").write_text("7")
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    assert [run_command(body) for _ in range(3)] == [130, 0, 0]
    assert seen == [False, True, False]


@pytest.mark.parametrize("change", ["params", "input", "name", "tracking", "saves"])
def test_resume_state_belongs_to_what_decides_the_result(params: Params, change: str) -> None:
    with open_stage("clean", params, {"data": DATA}, OUT) as run:
        write_manifest(run.staging)
    other, name = params, "clean"
    if change == "params":
        other = params.model_copy(update={"seed": params.seed + 1})
    elif change == "tracking":
        other = params.model_copy(update={"tracking": params.tracking.model_copy(update={"experiment": "another"})})
    elif change == "saves":
        other = params.model_copy(update={"saves": params.saves.model_copy(update={"seconds": 5.0})})
    elif change == "input":
        (DATA / "train.parquet").write_bytes(b"other rows")
        write_manifest(DATA)
    else:
        name = "tokenize"
    with open_stage(name, other, {"data": DATA}, OUT) as second:
        write_manifest(second.staging)
    assert (run.state == second.state) is (change in ("tracking", "saves"))


def test_every_generator_is_seeded(params: Params) -> None:
    import torch

    def draw() -> tuple[float, float, float]:
        with open_stage("clean", params, {}, OUT) as run:
            write_manifest(run.staging)
            return random.random(), float(numpy.random.random()), float(torch.rand(1))

    first = draw()
    random.seed(), numpy.random.seed(), torch.seed()
    assert draw() == first


def test_variants_have_names_of_their_own() -> None:
    names = []

    def body(run: StageRun) -> dict[str, Any]:
        names.append(run.name)
        return {}

    options = ("--variant", "prune", "--data", str(DATA), "--out", "artifacts/evaluate/prune")
    assert run_command(body, *options, variants=True) == 0
    assert names == ["clean@prune"]
    assert state_of_run("clean@prune")["tags"]["headroom.stage"] == "clean@prune"


@pytest.mark.parametrize("options", [(), ("--data", "x"), ("--data", "x", "--out", "y", "--surprise")])
def test_a_command_line_that_is_not_right_is_refused(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["stages.clean", *options])
        command("clean", write("x"), ["data"])
    assert ended.value.code == 2
    assert "usage: python -m stages.clean" in capsys.readouterr().err


SLEEPER = """
import sys, time
from pathlib import Path
from stages.core.stage import command

def body(run):
    (run.unit("model") / "weights").write_text("half")
    Path("started").touch()
    time.sleep(60)

command("clean", body, ["data"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_ends_within_seconds_and_leaves_the_old_output(number: signal.Signals) -> None:
    assert run_command(write("abc")) == 0
    before = digest(OUT)
    options = ["--data", str(DATA), "--out", str(OUT)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *options], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not Path("started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(number)
    _, spoken = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert digest(OUT) == before
    verify(OUT)
    if number != signal.SIGKILL:
        assert "clean: interrupted; the next run goes on from here" in spoken
        assert "Traceback" not in spoken
    assert run_command(write("xyz")) == 0  # the lock went with the process
    assert left_over() == []


def test_a_room_may_serve_a_second_stage_under_its_own_name() -> None:
    names = []

    def body(run: StageRun) -> dict[str, Any]:
        names.append((run.name, run.state.parent.name))
        return {}

    second = Path("artifacts/clean_again")
    assert run_command(body) == 0
    assert run_command(body, "--stage", "clean_again", "--data", str(DATA), "--out", str(second)) == 0
    assert names == [("clean", "clean"), ("clean_again", "clean_again")]
    runs = [json.loads(path.read_text()) for path in sorted((RUNS / "test").glob("clean*/run.json"))]
    assert sorted(run["name"] for run in runs) == ["clean", "clean_again"]
    assert runs[0]["params"] == runs[1]["params"]
    assert "near_duplicates.threshold" in runs[0]["params"]

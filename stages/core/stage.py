"""The contract that every stage keeps.

`open_stage` wraps a stage: it locks the output, checks the inputs against their manifests, seeds every generator,
records the run, measures time, memory and energy, and publishes the output in one step. `command` makes the command
line of a room out of a function that takes a `StageRun` and returns its metrics.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy
import psutil
from filelock import FileLock, Timeout

from stages.core.artifacts import (
    ARTIFACTS,
    MANIFEST,
    STATE,
    digest,
    file_sha256,
    publish,
    recover,
    tells_full_disk,
    text_sha256,
    verify,
    write_json,
    write_manifest,
)
from stages.core.errors import UserError
from stages.core.hardware import energy_joules, joules_between, peak_memory_mb
from stages.core.launch import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    check_processes,
    is_first_of_machine,
    is_first_process,
    launch,
    process_count,
)
from stages.core.observe.progress import say
from stages.core.observe.tracking import RunRecord, SilentRecord
from stages.core.params import ParallelAxis, ParallelParams, Params, load_params

PARAMS = Path("params.yaml")
METRICS = "metrics.json"
HISTORY = "history.csv"
MEASURED = "measured.json"

_SPARE_DISK_BYTES = 256 * 2**20


@dataclass
class StageRun:
    """What a stage works with while it runs."""

    name: str
    """Stage and, where there are several, variant: `prune`, `export@quantize`."""
    params: Params
    inputs: Mapping[str, Path]
    """Verified input folders, by role."""
    staging: Path
    """Folder that becomes the stage's output."""
    state: Path
    """Folder for resume state, keyed by everything that decides the result; outlives a killed run."""
    record: RunRecord
    history: list[dict[str, float]] = field(default_factory=list)
    _units: list[Path] = field(default_factory=list)

    def unit(self, name: str) -> Path:
        """Create a part of the output that other stages read and that gets its own manifest, such as `model`."""
        folder = self.staging / name
        folder.mkdir(parents=True)
        self._units.append(folder)
        return folder

    def log(self, step: int, **values: float) -> None:
        """Add a point to the curves: the history file and the live run."""
        self.history.append({"step": step, **values})
        self.record.log(step, values)

    def say(self, message: str) -> None:
        """Tell people what is going on, unless another process does."""
        if is_first_process():
            say(f"{self.name}: {message}")


@contextmanager
def open_stage(
    name: str, params: Params, inputs: Mapping[str, Path], out: Path, section: str | None = None
) -> Iterator[StageRun]:
    """Wrap one run of a stage; see the module's text. Whatever the body raises leaves the old output as it was.

    Args:
        name: stage, or `stage@variant`.
        params: the validated params.
        inputs: input folders by role; each must carry a valid manifest.
        out: folder to publish.
        section: of the params, recorded with the run; None takes the one that is named like the stage.

    Raises:
        UserError: if an input is missing or altered, the disk is nearly full, or the stage is already running.
    """
    with _only_one(out):
        recover(out)
        for folder in inputs.values():
            verify(folder)
        _check_disk(inputs)
        _seed(params.seed)
        key = _state_key(name, params, inputs)
        staging = _new_staging(name)
        origins = {role: digest(folder) for role, folder in inputs.items()}
        record = RunRecord.start(name, params, origins, section)
        run = StageRun(name, params, inputs, staging, STATE / name / key, record)
        try:
            yield run
            publish(staging, out)
        except BaseException as problem:
            record.fail(problem)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(run.state, ignore_errors=True)
        record.finish(out)


@contextmanager
def join_stage(name: str, params: Params, inputs: Mapping[str, Path]) -> Iterator[StageRun]:
    """Take part in a run of a stage that another process leads: what this one writes is dropped.

    Raises:
        UserError: if an input is missing or altered.
    """
    for folder in inputs.values():
        verify(folder)
    _seed(params.seed)
    with tempfile.TemporaryDirectory(prefix="headroom-") as staging:
        state = STATE / name / _state_key(name, params, inputs)
        yield StageRun(name, params, inputs, Path(staging), state, SilentRecord())


def command(
    name: str,
    body: Callable[[StageRun], dict[str, Any]],
    inputs: Sequence[str],
    variants: bool = False,
    optional: Sequence[str] = (),
    parallel: Sequence[ParallelAxis] = (),
) -> None:
    """Run a room from its command line and exit: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted.

    Args:
        name: the stage that the room is named after; `--stage` names another that the room serves as well.
        body: does the work in `run.staging` and returns metrics, written to `metrics.json`.
        inputs: roles of the input folders; each becomes an option, such as `--data`.
        variants: whether the stage is run for several models, told apart by `--variant`.
        optional: roles that the graph may leave out; the run then has no such input.
        parallel: how the room's training may be spread over processes; nothing for a room that runs in one.
    """
    arguments = _parser(name, inputs, variants, optional).parse_args()
    given = {role: getattr(arguments, role) for role in (*inputs, *optional)}
    paths = {role: path for role, path in given.items() if path is not None}
    full_name = f"{arguments.stage}@{arguments.variant}" if variants else arguments.stage
    sys.exit(_run_command(name, full_name, body, paths, arguments.out, parallel))


def _run_command(
    name: str,
    full_name: str,
    body: Callable[[StageRun], dict[str, Any]],
    paths: Mapping[str, Path],
    out: Path,
    parallel: Sequence[ParallelAxis],
) -> int:
    # Ctrl-C and a polite kill end alike: the training loop saves its state, everything else just stops.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        params = load_params(PARAMS)
        wanted = _to_launch(params, parallel)
        if wanted is not None:
            return launch(wanted, f"stages.{name}")
        leads = is_first_process()
        stage = open_stage(full_name, params, paths, out, name) if leads else join_stage(full_name, params, paths)
        with stage as run:
            _run_body(run, body)
    except UserError as error:
        for line in str(error).splitlines() if is_first_of_machine() else ():
            say(f"{full_name}: {line}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if is_first_process():
            say(f"{full_name}: interrupted; the next run goes on from here")
        return EXIT_INTERRUPTED
    except Exception as error:  # whatever it is, it goes on up unless the disk is full
        if not tells_full_disk(error):
            raise
        say(f"{full_name}: the disk of {Path.cwd()} is full; free some space and run again, nothing was lost")
        return EXIT_USER_ERROR
    return 0


def _to_launch(params: Params, allowed: Sequence[ParallelAxis]) -> ParallelParams | None:
    """Name the processes that this one is to start; None where they run already, or this one is enough.

    Raises:
        UserError: if the room cannot be spread so, or another number of processes runs.
    """
    wanted = params.training.parallel
    if not allowed or wanted is None or wanted.processes == 1:
        check_processes(None)
        return None
    for axis, size in wanted.model_dump().items():
        if size > 1 and axis not in allowed:
            raise UserError(f"training.parallel.{axis}: this stage knows {' and '.join(allowed)} alone; set it to 1")
    if process_count() is None:
        return wanted
    check_processes(wanted)
    return None


def _run_body(run: StageRun, body: Callable[[StageRun], dict[str, Any]]) -> None:
    started, energy = time.monotonic(), energy_joules()
    metrics = body(run)
    spent = joules_between(energy, energy_joules())
    measured = {
        "inputs": {role: digest(folder) for role, folder in run.inputs.items()},
        "wall_seconds": round(time.monotonic() - started, 3),
        "peak_memory_mb": peak_memory_mb(),
        "energy_joules": None if spent is None else round(spent, 1),
    }
    write_json(run.staging / METRICS, metrics)
    write_json(run.staging / MEASURED, measured)
    if run.history:
        _write_history(run.staging / HISTORY, run.history)
    for folder in run._units:
        write_manifest(folder)
    write_manifest(run.staging)
    run.record.add_metrics({**metrics, **measured})
    run.say(f"done in {measured['wall_seconds']:.1f} s")


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Write one row per logged point; a curve without a value at a point has an empty cell there."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def _parser(name: str, inputs: Sequence[str], variants: bool, optional: Sequence[str]) -> argparse.ArgumentParser:
    room = sys.modules.get(f"stages.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{name}",
        description=(room.__doc__ if room and room.__doc__ else name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for role in inputs:
        parser.add_argument(f"--{role}", type=Path, required=True, help=f"input folder: {role}")
    for role in optional:
        parser.add_argument(f"--{role}", type=Path, help=f"input folder, where there is one: {role}")
    if variants:
        parser.add_argument("--variant", required=True, help="which model, such as quantize")
    parser.add_argument("--stage", default=name, help="its name in dvc.yaml where that is not the room's")
    parser.add_argument("--out", type=Path, required=True, help="output folder, replaced as a whole")
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Refuse to run a stage twice at a time over the same output."""
    path = STATE / "locks" / f"{quote(out.as_posix(), safe='')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{out}: another run is writing it; wait until it ends (lock: {path})") from None
    try:
        yield
    finally:
        lock.release()


def _new_staging(name: str) -> Path:
    """Make an empty folder to write the output in; what killed runs of the stage left there is removed."""
    staging = STATE / "staging" / f"{name}-{os.getpid()}"
    for left in staging.parent.glob(f"{name}-*"):
        owner = left.name.rpartition("-")[2]
        if left == staging or not owner.isdigit() or not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _check_disk(inputs: Mapping[str, Path]) -> None:
    """A stage writes about as much as it reads; require twice that and some to spare before any work starts."""
    size = sum(path.stat().st_size for folder in inputs.values() for path in folder.rglob("*") if path.is_file())
    needed = 2 * size + _SPARE_DISK_BYTES
    ARTIFACTS.mkdir(exist_ok=True)
    free = shutil.disk_usage(ARTIFACTS).free
    if free < needed:
        raise UserError(
            f"{ARTIFACTS.resolve()}: {free >> 20} MiB free on the disk, {needed >> 20} MiB needed; free some space"
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")  # data stages never import it
    if torch is not None:
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and hides nothing here


def _state_key(name: str, params: Params, inputs: Mapping[str, Path]) -> str:
    """Name everything that decides a result: inputs, params and the checkpoints they name, and code.

    Resume state of anything else is stale. How often states are saved, and by how many processes, may change between a
    run and its resumption.
    """
    values = params.model_dump_json(exclude={"tracking": True, "saves": True, "training": {"parallel"}})
    code = [file_sha256(path) for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    sums = [file_sha256(folder / MANIFEST) for folder in inputs.values()]
    folders = params.distill.checkpoints().values()
    named = [file_sha256(path) for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return text_sha256("\n".join([name, values, *sums, *named, *code]))[:16]

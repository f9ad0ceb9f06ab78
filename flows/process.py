"""One stage as one `dvc repro` process: started, listened to, interrupted, and its ending understood.

`dvc repro` answers 255 whatever the stage's own exit code was. The code is read from DVC's message, and what a fault
was from the run's record, in which the stage names the exception that ended it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import psutil

from stages.core.artifacts import read_json
from stages.core.observe.tracking import EXECUTION_VARIABLE, MIRRORED_VARIABLE, RUN_FILE, RUNS

Show = Callable[[str], None]
Kind = Literal["ran", "cached", "refused", "interrupted", "fault", "broken"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_EXIT_CODE = re.compile(r"failed to run: .*, exited with (-?\d+)$")
_DVC_ERROR = re.compile(r"^ERROR: (.*)")
_SKIPPED = re.compile(r"^Stage '.*' (didn't change, skipping|is cached - skipping run, checking out outputs)$")
_CHATTER = re.compile(
    r"^(Running stage '.*':|> .*|(Generating|Updating) lock file 'dvc\.lock'|To track the changes with git, run:"
    r"|\tgit add .*|To enable auto staging, run:|\tdvc config core\.autostage true|Use `dvc push` to .*"
    r"|Data and pipelines are up to date\.|Building workspace index.*|Comparing indexes.*|Applying changes.*"
    r"|[AMD]\s+artifacts/.*|ERROR: failed to reproduce.*|ERROR: failed to run.*|\s*)$"
)
_SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}
_INTERRUPTS = {EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGTERM}
# Exceptions that tell of the machine or the network and not of the code; those a second try may get past.
_PASSING = {
    "BrokenPipeError", "ChunkedEncodingError", "ConnectError", "ConnectTimeout", "ConnectionAbortedError",
    "ConnectionError", "ConnectionRefusedError", "ConnectionResetError", "HTTPError", "HfHubHTTPError",
    "IncompleteRead", "MemoryError", "NewConnectionError", "OSError", "ProtocolError", "ReadTimeout",
    "RemoteProtocolError", "SSLError", "TimeoutError", "URLError", "gaierror",
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How a stage's process ended."""

    kind: Kind
    """refused: a user's mistake; fault: of the machine or the network, worth another try; broken: anything else."""
    message: str


class Processes:
    """The `dvc` processes of one flow.

    Each has a session of its own, so that Ctrl-C on a terminal reaches the flow alone. The flow passes it on to the
    stages and not to DVC, which then tidies up after them.
    """

    def __init__(self, side_by_side: bool = False, mirrored: bool = False) -> None:
        """Start with none.

        Args:
            side_by_side: whether several may run at a time.
            mirrored: whether a `Tracker` tells MLflow of the runs; otherwise each stage tells of its own.
        """
        self.stopping = threading.Event()
        self._mirrored = mirrored
        self._side_by_side = side_by_side
        self._live: dict[int, subprocess.Popen[bytes]] = {}
        self._told: set[int] = set()

    def repro(self, stage: str, execution: str, show: Show, force: bool = False) -> Ending:
        """Run `dvc repro` on one stage and wait until it ends.

        Args:
            stage: its name.
            execution: that the stage's run belongs to.
            show: takes the stage's output line by line as it comes.
            force: run it even if nothing changed.
        """
        return self._run(stage, execution, ["repro", "--single-item", *(["--force"] if force else []), stage], show)

    def checkout(self, stage: str, execution: str, show: Show) -> Ending:
        """Bring a stage's unchanged output back from DVC's cache."""
        ending = self._run(stage, execution, ["checkout", stage], show)
        return Ending("cached", "brought back from DVC's cache") if ending.kind == "ran" else ending

    def forward(self) -> None:
        """Interrupt the stages that were not told yet; to be called again and again while stopping."""
        for process in list(self._live.values()):
            for child in _stage_processes(process.pid):
                if child.pid not in self._told:
                    self._told.add(child.pid)
                    _signal(child, signal.SIGINT)

    def kill(self) -> None:
        """End everything at once; the next run finds the last whole state."""
        for process in list(self._live.values()):
            for child in _descendants(process.pid):
                _signal(child, signal.SIGKILL)
            process.kill()

    def _run(self, stage: str, execution: str, arguments: list[str], show: Show) -> Ending:
        if self.stopping.is_set():
            return Ending("interrupted", "did not start")
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
        process = subprocess.Popen(
            command,
            env=_environment(execution, self._side_by_side, self._mirrored),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._live[process.pid] = process
        try:
            assert process.stdout is not None  # it is a pipe
            heard = _Listener(stage, self.stopping, show)
            heard.listen(process.stdout)
            return heard.ending(process.wait(), execution)
        finally:
            del self._live[process.pid]


class _Listener:
    """Passes a stage's lines on and remembers what DVC said."""

    def __init__(self, stage: str, stopping: threading.Event, show: Show):
        self._stage = stage
        self._show = show
        self._stopping = stopping
        self._code: int | None = None
        self._skipped = False
        self._error = ""

    def listen(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            if found := _EXIT_CODE.search(line):
                self._code = int(found.group(1))
            elif found := _DVC_ERROR.match(line):
                self._error = found.group(1)
            self._skipped = self._skipped or bool(_SKIPPED.match(line))
            if self._worth_showing(line):
                self._show(line)

    def _worth_showing(self, line: str) -> bool:
        if self._stopping.is_set():  # an import that Ctrl-C cut short would show its traceback
            return line.startswith(f"{self._stage}:")
        return not (_CHATTER.match(line) or _SKIPPED.match(line))

    def ending(self, code: int, execution: str) -> Ending:
        if code == 0:
            return Ending("cached", "DVC found nothing to do") if self._skipped else Ending("ran", "")
        if self._stopping.is_set() or self._code in _INTERRUPTS:
            return Ending("interrupted", "stopped; the next run goes on from there")
        if self._code == EXIT_USER_ERROR:
            return Ending("refused", _recorded_error(execution, self._stage) or "its input was refused, see above")
        if self._code is None:
            return _ending_of_dvc(code, self._error)
        return _ending_of_stage(self._code, _recorded_error(execution, self._stage))


def _ending_of_dvc(code: int, error: str) -> Ending:
    if code < 0:
        return Ending("fault", f"dvc was ended by {_signal_name(-code)}")
    return Ending("broken", f"dvc: {error or f'ended with exit code {code}'}")


def _ending_of_stage(code: int, error: str) -> Ending:
    number = -code if code < 0 else code - 128
    if number > 0:
        hint = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
        return Ending("fault", f"was ended by {_signal_name(number)}{hint}")
    kind: Kind = "fault" if error.partition(":")[0] in _PASSING else "broken"
    return Ending(kind, error or f"ended with exit code {code}")


def _recorded_error(execution: str, stage: str) -> str:
    """What the newest record of the stage in this execution says ended it; empty where there is none."""
    records = [read_json(path) for path in (RUNS / execution).glob(f"{stage}-*/{RUN_FILE}")]
    if not records:
        return ""
    newest = max(records, key=lambda record: int(record["started"]))
    return str(newest["tags"].get("headroom.error", "")).removeprefix("UserError: ")


def _environment(execution: str, side_by_side: bool, mirrored: bool) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", EXECUTION_VARIABLE: execution}
    if mirrored:
        environment[MIRRORED_VARIABLE] = "1"
    if side_by_side:
        # PyTorch's threads spin while they wait for one another; spinning beside another stage made a training step
        # four times slower in the median and twenty times at worst, sleeping less than twice.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Whole lines; of a progress bar drawn over and over on one line the last state counts."""
    for line in stream:
        yield line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]


def _stage_processes(pid: int) -> Iterator[psutil.Process]:
    """The commands that `dvc` started; a shell that did not make way for its command counts with the command."""
    for child in _descendants(pid, recursive=False):
        yield child
        if _name(child) in _SHELLS:
            yield from _descendants(child.pid, recursive=False)


def _descendants(pid: int, recursive: bool = True) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

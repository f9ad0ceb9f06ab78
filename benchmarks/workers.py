"""The processes that contenders run in, and their turns: one works, the others are stopped."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.environments import last_complaint

ROOT = Path(__file__).parents[1]
_SECONDS_TO_END = 10
_LONGEST_TURN_SECONDS = 900
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "true",
}


class WorkerError(Exception):
    """A contender's process failed; the message is one line."""


class Worker:
    """A process that serves one contender.

    It is stopped (SIGSTOP) except while it answers, so that threads which wait for work by spinning take nothing from
    the others, and no runtime has to be told to wait otherwise than it does by itself.

    Args:
        python: interpreter of its environment.
        module: to run.
        request: what to serve.
        log: file for what it prints.
        folder: that it runs in.
    """

    def __init__(self, python: Path, module: str, request: Mapping[str, Any], log: Path, folder: Path = ROOT):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=folder,
                env=environment(python),
            )
        self._stop()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Let it work on a request, then stop it again.

        Raises:
            WorkerError: if it ends instead of answering, or takes longer than a quarter of an hour.
        """
        assert self._process.stdin and self._process.stdout
        self._process.send_signal(signal.SIGCONT)
        watchdog = threading.Timer(_LONGEST_TURN_SECONDS, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            self._process.wait(_SECONDS_TO_END)
            raise WorkerError(last_complaint(self._log.read_text(encoding="utf-8", errors="replace")))
        self._stop()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that needs saving, and a stopped process hears nothing else
        self._process.communicate()

    def _stop(self) -> None:
        """Stop the process, and wait until it stands still: the signal alone promises no time."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_once(python: Path, module: str, request: Mapping[str, Any], seconds: float) -> float:
    """Run a module with a request in its environment to the end; return the seconds it took.

    It runs in an empty folder that goes away: some peers cache results where they run, and must not find them again.

    Raises:
        WorkerError: if it fails or takes longer than `seconds`.
    """
    command = [str(python), "-m", module, json.dumps(request)]
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
    ):
        try:
            done = subprocess.run(
                command, stdout=output, stderr=output, timeout=seconds, check=False, cwd=folder, env=environment(python)
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(f"gave up after {seconds / 60:.0f} minutes") from None
        output.seek(0)
        if done.returncode != 0:
            raise WorkerError(last_complaint(output.read()))
    return time.monotonic() - started


def environment(python: Path) -> dict[str, str]:
    """Variables for a contender's process: the caller's, with its own programs first and no word to the network."""
    inherited = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    path = os.pathsep.join([str(python.parent), inherited.get("PATH", os.defpath)])
    return {**inherited, **_SETTINGS, "PATH": path, "PYTHONPATH": str(ROOT)}


def contenders_seconds() -> float:
    """Processor seconds of all processes that this one has started and seen end."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def thread_settings(names: Sequence[str] = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")) -> dict[str, str]:
    """What the caller has set for threads; it holds for all contenders and belongs into the results."""
    return {name: os.environ[name] for name in names if name in os.environ}

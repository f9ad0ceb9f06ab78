"""One flow at a time in a project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from stages.core.artifacts import STATE, read_json, write_json
from stages.core.errors import UserError
from stages.core.observe.progress import say

RUN_LOCK = STATE / "run.lock"
_HOLDER = STATE / "run.json"


@contextmanager
def only_run(wait: bool) -> Iterator[None]:
    """Hold the right to run the flow; inside the process that holds it this does nothing.

    Args:
        wait: until a run that is going has ended.

    Raises:
        UserError: if a run is going and `wait` is false.
    """
    lock = _lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"{_holder()}; wait until it ends, or use `headroom run --wait`") from None
        say(f"{_holder()}; waiting until it ends")
        lock.acquire(poll_interval=0.5)
    try:
        write_json(_HOLDER, {"pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")})
        yield
    finally:
        lock.release()


def _lock() -> FileLock:
    path = Path(RUN_LOCK).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False, is_singleton=True)


def _holder() -> str:
    """Say who holds the lock; between taking it and saying so a run is nameless for an instant."""
    try:
        holder = read_json(_HOLDER)
    except UserError:
        return "another run is going"
    return f"another run is going: process {holder['pid']}, since {holder['since']}"

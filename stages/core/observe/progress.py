"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

from stages.core.launch import is_first_process

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """Write one line for people, above any progress bar."""
    tqdm.write(message, file=sys.stderr)


def track(
    items: Iterable[Item], description: str, total: int | None = None, status: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield the items and show how far along they are, with what `status` says, unless another process shows it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not is_first_process():
        yield from items
    elif sys.stderr.isatty():
        with tqdm(items, desc=description, total=total, leave=False) as bar:
            for item in bar:
                bar.set_postfix_str(status(), refresh=False)
                yield item
    else:
        yield from _plain(items, description, total, status)


def _plain(items: Iterable[Item], description: str, total: int | None, status: Callable[[], str]) -> Iterator[Item]:
    started = spoken = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - spoken >= _SECONDS_BETWEEN_LINES:
            spoken = now
            share = f"{done}/{total}" if total else str(done)
            said = f", {status()}" if status() else ""
            say(f"  {description}: {share} after {now - started:.0f} s{said}")
        yield item

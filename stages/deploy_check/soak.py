"""A soak run: requests as a service gets them, for a while, and what goes wrong meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import psutil

from stages.core.metrics import Array
from stages.core.timing import percentiles

Answer = Callable[[Sequence[str]], Array]

ODD_TEXTS = (
    "",
    " \t\n ",
    "?" * 3000,
    "word " * 5000,
    "a" * 100_000,
    "\x00\x07\x1b[31m",
    "\u202eright to left\u202c العربية עברית",
    "😀🏽‍🚀 ﷽ Z̸̛͓a̴l̵g̶o",
    "half a pair \ud800",
    "'; DROP TABLE texts; -- <script>",
    "中文也可以 한국어 ไทย",
)
"""What services get sent beside text: nothing, far too much, control characters, other scripts, broken Unicode."""

_SIZES = (1, 1, 1, 1, 2, 1, 1, 8, 1, 1, 32)
_KEPT_MESSAGES = 5
_TOLERANCE = 1e-3


def soak(answer: Answer, texts: Sequence[str], labels: int, seconds: float, seed: int) -> dict[str, Any]:
    """Send requests one after the other until the time is over; at least one round of all sizes and odd texts.

    Args:
        answer: gives probabilities [texts, labels].
        texts: real ones.
        labels: how many the model has.
        seconds: to go on for.
        seed: of the mix.

    Returns:
        `requests`, `errors`, `error_rate`, the first `messages`; `latency_ms` of single real texts; `latency_drift`,
        their p95 in the second half of the time over that in the first; `memory_growth_mb` from a fifth of the time on.
    """
    singles: list[tuple[float, float]] = []  # (seconds since the start, milliseconds)
    messages: list[str] = []
    requests = errors = 0
    settled: float | None = None
    started = time.monotonic()
    least = len(_SIZES) + len(ODD_TEXTS)
    for request in _requests(texts, seed):
        spent = time.monotonic() - started
        if spent >= seconds and requests >= least:
            break
        if settled is None and spent >= seconds / 5:
            settled = _memory_mb()
        requests += 1
        begun = time.perf_counter_ns()
        problem = _problem(answer, request, labels)
        milliseconds = (time.perf_counter_ns() - begun) / 1e6
        if problem is not None:
            errors += 1
            messages = [*messages, problem][:_KEPT_MESSAGES]
        elif len(request) == 1 and request[0] not in ODD_TEXTS:
            singles.append((spent, milliseconds))
    elapsed = time.monotonic() - started
    latencies = [value for _, value in singles]
    return {
        "seconds": round(elapsed, 1),
        "requests": requests,
        "errors": errors,
        "error_rate": errors / requests,
        "messages": messages,
        "latency_ms": percentiles(latencies) if latencies else None,
        "latency_drift": _drift(singles, elapsed / 2),
        "memory_growth_mb": round(max(0.0, _memory_mb() - (settled or _memory_mb())), 1),
    }


def _requests(texts: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Every odd text alone, then batches of all sizes, one odd text hidden in each large one; again and again."""
    generator = random.Random(seed)
    while True:
        for text in ODD_TEXTS:
            yield [text]
            for size in _SIZES:
                request = generator.choices(texts, k=size)
                if size > 1:
                    request[generator.randrange(size)] = generator.choice(ODD_TEXTS)
                yield request


def _problem(answer: Answer, request: Sequence[str], labels: int) -> str | None:
    """What is wrong with the answer to a request, None if nothing."""
    try:
        probabilities = answer(request)
    except Exception as error:  # noqa: BLE001  whatever a runtime throws is a failed request, and is counted and told
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if probabilities.shape != (len(request), labels):
        return f"answer of shape {probabilities.shape} where {(len(request), labels)} was expected"
    if not numpy.isfinite(probabilities).all():
        return "probabilities that are not finite"
    if (probabilities < 0).any() or numpy.abs(probabilities.sum(axis=1) - 1).max() > _TOLERANCE:
        return "probabilities that do not sum to 1"
    return None


def _drift(singles: Sequence[tuple[float, float]], middle: float) -> float | None:
    first = [value for moment, value in singles if moment < middle]
    second = [value for moment, value in singles if moment >= middle]
    if not first or not second:
        return None
    return percentiles(second)["p95"] / percentiles(first)["p95"]


def _memory_mb() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)

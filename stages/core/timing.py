"""Honest timing: contenders take turns, so that what the machine does meanwhile hits all of them alike.

A speed alone says little on a machine that is shared, throttles or sleeps; the ratio of two contenders timed in the
same minute says a lot. So every speed is a ratio per round, with its spread over the rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy
import psutil

from stages.core.hardware import usable_processors
from stages.core.observe.progress import track

Item = TypeVar("Item")
_NANOSECONDS = 1e9


def interleave(
    contenders: Mapping[str, Callable[[], int]], rounds: int, seed: int, warm_up_rounds: int = 1
) -> dict[str, list[float]]:
    """Measure throughput: in every round each contender runs once, in an order drawn anew.

    Args:
        contenders: by name; a call does some work and returns how many items it did.
        rounds: that count.
        seed: of the order.
        warm_up_rounds: before them, that do not count.

    Returns:
        items a second, one number a round, by name.
    """
    order, generator = list(contenders), random.Random(seed)
    for _ in range(warm_up_rounds):
        for name in order:
            contenders[name]()
    throughput: dict[str, list[float]] = {name: [] for name in order}
    with uncollected():
        for _ in track(range(rounds), "throughput, round"):
            generator.shuffle(order)
            for name in order:
                throughput[name].append(items_per_second(contenders[name]))
    return throughput


def interleave_latency(
    contenders: Mapping[str, tuple[Callable[[Item], object], Sequence[Item]]], rounds: int, seed: int
) -> dict[str, list[list[float]]]:
    """Measure latency: in every round each contender answers its share of its items, one by one.

    Warm each contender up before; no item is answered twice here.

    Args:
        contenders: by name, what answers one item, and the items, at least one a round.
        rounds: over which the items are spread.
        seed: of the order.

    Returns:
        milliseconds per item, one list a round, by name.
    """
    order, generator = list(contenders), random.Random(seed)
    latencies: dict[str, list[list[float]]] = {name: [] for name in order}
    with uncollected():
        for number in track(range(rounds), "latency, round"):
            generator.shuffle(order)
            for name in order:
                answer, items = contenders[name]
                latencies[name].append(durations(answer, items[number::rounds]))
    return latencies


def durations(answer: Callable[[Item], object], items: Sequence[Item]) -> list[float]:
    """Time a call per item, in milliseconds; wrap it in `uncollected`."""
    spent = []
    for item in items:
        started = time.perf_counter_ns()
        answer(item)
        spent.append((time.perf_counter_ns() - started) / 1e6)
    return spent


def items_per_second(work: Callable[[], int]) -> float:
    """Time one call that returns how many items it did; wrap it in `uncollected`."""
    started = time.perf_counter_ns()
    items = work()
    return items * _NANOSECONDS / (time.perf_counter_ns() - started)


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Summarize latencies as p50, p95 and p99."""
    values = numpy.percentile(numpy.asarray(milliseconds), [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Divide two contenders' numbers round by round; median, and the least and greatest as `low` and `high`."""
    per_round = [one / other for one, other in zip(first, second, strict=True)]
    return {"median": float(numpy.median(per_round)), "low": min(per_round), "high": max(per_round)}


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from running while something is timed.

    Collecting a heap that holds PyTorch takes a third of a second, so wrap a whole measurement, not each call.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class OtherLoad:
    """What else ran on the processors during a measurement."""

    share: float = 0.0
    """Of the processors' time, from 0 to 1."""


@contextmanager
def watch_other_load() -> Iterator[OtherLoad]:
    """Measure how busy other processes, and other machines on the same host, keep the processors meanwhile.

    Taking turns does not make up for all of it: PyTorch's threads wait for each other after every operation, so a
    busy machine hits it harder than runtimes with other pools. A reader should know.
    """
    load = OtherLoad()
    started, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    yield load
    available = (time.monotonic() - started) * len(usable_processors())
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    load.share = min(1.0, max(0.0, others / available)) if available else 0.0


def _busy_seconds() -> float:
    usable = set(usable_processors())
    times = [entry for number, entry in enumerate(psutil.cpu_times(percpu=True)) if number in usable]
    return sum(entry.user + entry.system + getattr(entry, "nice", 0) + getattr(entry, "steal", 0) for entry in times)


def _own_seconds() -> float:
    spent = psutil.Process().cpu_times()
    return spent.user + spent.system

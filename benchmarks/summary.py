"""From measurements to the figures of the table: medians, ratios, quality with intervals, and who won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from benchmarks.contenders import NAIVE, REFERENCE, Contender
from stages.core.metrics import paired_bootstrap, score
from stages.core.timing import ratios

_BOOTSTRAP_SAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """A line of the table; of a contender that failed only `name`, `title` and `error` say anything."""

    name: str
    title: str
    headroom: bool
    error: str
    quality: float
    """Share, from 0 to 1."""
    difference: float
    """To the fine-tuned model in PyTorch."""
    low: float
    high: float
    p50: float
    """Milliseconds for one text."""
    p99: float
    throughput: tuple[float, ...]
    """Texts a second, a number a round."""
    latency: tuple[float, ...]
    """Median milliseconds for one text, a number a round."""
    batch_size: int
    model_bytes: int
    peak_memory_mb: float
    compress_minutes: float | None

    @property
    def texts_per_second(self) -> float:
        """The median round."""
        return float(numpy.median(self.throughput))


def make_rows(
    contenders: Sequence[Contender],
    measured: Mapping[str, Mapping[str, Any]],
    labels: Sequence[int],
    metric: str,
    seed: int,
) -> list[Row]:
    """Summarize the contenders, in their order.

    Args:
        contenders: to show.
        measured: by name, as `benchmarks.measure.measure` returns.
        labels: true classes of the test split.
        metric: accuracy, f1_macro or f1_weighted.
        seed: of the bootstrap.
    """
    reference = numpy.asarray(measured[REFERENCE]["predictions"])
    truth = numpy.asarray(labels)
    return [_row(contender, measured[contender.name], reference, truth, metric, seed) for contender in contenders]


def failed(contender: Contender, error: str) -> Row:
    """The line of a contender that could not be installed, made or served."""
    return Row(
        contender.name,
        contender.title,
        contender.headroom,
        error,
        *(0.0,) * 6,
        throughput=(),
        latency=(),
        batch_size=0,
        model_bytes=0,
        peak_memory_mb=0.0,
        compress_minutes=None,
    )


def within(row: Row, floor: float) -> bool:
    """Whether a contender ran and lost at most `floor` of quality."""
    return not row.error and row.difference >= -floor


def fastest(rows: Sequence[Row], floor: float, headroom: bool) -> Row | None:
    """The contender of most texts a second within the floor, among Headroom's models or among the peers."""
    candidates = [row for row in rows if row.headroom == headroom and within(row, floor)]
    return max(candidates, key=lambda row: row.texts_per_second, default=None)


def soonest(rows: Sequence[Row], floor: float, headroom: bool) -> Row | None:
    """The contender of the lowest median latency within the floor, among Headroom's models or among the peers."""
    candidates = [row for row in rows if row.headroom == headroom and within(row, floor)]
    return min(candidates, key=lambda row: row.p50, default=None)


@dataclass(frozen=True)
class Victory:
    """How many times better the best of Headroom is than something else, round by round."""

    what: str
    winner: str
    over: str
    median: float
    low: float
    high: float


def victories(rows: Sequence[Row], floor: float) -> list[Victory]:
    """Compare Headroom's best within the floor with PyTorch, padded PyTorch and the best peer within the floor."""
    by_name = {row.name: row for row in rows if not row.error}
    many, one = fastest(rows, floor, headroom=True), soonest(rows, floor, headroom=True)
    found = []
    for what, other in (("throughput", REFERENCE), ("throughput", NAIVE)):
        if many and other in by_name:
            found.append(_victory(what, many, by_name[other]))
    peer, quick = fastest(rows, floor, headroom=False), soonest(rows, floor, headroom=False)
    if many and peer:
        found.append(_victory("throughput", many, peer))
    if one and quick:
        found.append(_victory("latency at batch 1", one, quick))
    return found


def _victory(what: str, winner: Row, other: Row) -> Victory:
    if what == "throughput":
        times = ratios(winner.throughput, other.throughput)
    else:
        times = ratios(other.latency, winner.latency)
    return Victory(what, winner.title, other.title, times["median"], times["low"], times["high"])


def _row(
    contender: Contender,
    result: Mapping[str, Any],
    reference: numpy.ndarray,
    truth: numpy.ndarray,
    metric: str,
    seed: int,
) -> Row:
    if "error" in result:
        return failed(contender, str(result["error"]))
    answers = reference if result["predictions"] is None else numpy.asarray(result["predictions"])
    difference, low, high = paired_bootstrap(metric, answers, reference, truth, _BOOTSTRAP_SAMPLES, _CONFIDENCE, seed)
    p50, p99 = numpy.percentile(result["latency_ms"], [50, 99])
    return Row(
        contender.name,
        contender.title,
        contender.headroom,
        "",
        score(metric, answers, truth),
        difference,
        low,
        high,
        float(p50),
        float(p99),
        throughput=tuple(result["texts_per_second"]),
        latency=tuple(float(numpy.median(each)) for each in _by_round(result)),
        batch_size=result["batch_size"],
        model_bytes=result["model_bytes"],
        peak_memory_mb=result["peak_memory_mb"],
        compress_minutes=result["compress_minutes"],
    )


def _by_round(result: Mapping[str, Any]) -> list[list[float]]:
    """Latencies of each round: they were appended round after round, about as many in each."""
    rounds = len(result["texts_per_second"])
    return [list(part) for part in numpy.array_split(result["latency_ms"], rounds)]

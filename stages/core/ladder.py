"""The performance ladder: what every compressed model gains and costs, from the metrics of `evaluate`.

Speeds of different runs are never divided by each other. Each variant was timed beside both PyTorch baselines, so a
variant's gain over its parent is the quotient of their gains over the fair baseline, in which a slower or busier
machine cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from stages.core.errors import UserError

CHAIN = ("finetune", "distill", "prune", "quantize")
"""Variants in the order in which each is made from the one before."""
VARIANTS = (*CHAIN, "quantize_finetuned", "cascade")
"""Every model that is evaluated: the chain, then what stands beside it."""
PARENTS = {
    **dict(zip(CHAIN[1:], CHAIN, strict=False)),
    "quantize_finetuned": "finetune",
    "cascade": "quantize_finetuned",
}
"""Which variant one is made from; a cascade is held against its larger model, whose answers it stands for."""
TITLES = {
    "finetune": "fine-tuned",
    "distill": "distilled",
    "prune": "pruned",
    "quantize": "quantized",
    "quantize_finetuned": "quantized only",
    "cascade": "cascade",
}
"""What people call a variant."""
NAIVE = "naive PyTorch"
FAIR = "fair PyTorch"


@dataclass(frozen=True)
class Gain:
    """How many times faster, with the smallest and largest value over the rounds of the measurement."""

    median: float
    low: float
    high: float


_NO_GAIN = Gain(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class LadderRow:
    """One rung: a baseline or a variant. None where a value does not exist or was not measured."""

    name: str
    baseline: bool
    parent: str | None
    metric: str
    """Which quality `quality` is, such as accuracy."""
    quality: float
    difference: float | None
    """Quality minus that of the fine-tuned PyTorch model on the same texts; None for that model itself."""
    low: float | None
    """Ends of the paired bootstrap interval of `difference`."""
    high: float | None
    confidence: float | None
    detectable: float | None
    """Smallest true difference of accuracy that a test on these texts finds in four of five cases, as a share."""
    within_floor: bool
    latency_runtime: str
    latency_p50_ms: float
    """At batch 1, tokenization included."""
    latency_p95_ms: float
    throughput_runtime: str
    batch_size: int | None
    texts_per_second: float
    """At the best batch size, tokenization included."""
    model_bytes: int | None
    parameters: int | None
    peak_memory_mb: float | None
    over_parent: float | None
    """Throughput over that of the parent; for the fine-tuned model, over the fair baseline."""
    over_fair: Gain
    """Throughput over that of PyTorch fp32 padded to the longest text of the batch."""
    over_naive: Gain
    """Throughput over that of PyTorch fp32 padded to the maximum length."""
    latency_over_fair: Gain
    latency_over_naive: Gain

    @property
    def title(self) -> str:
        """What people call the model: fine-tuned, naive PyTorch."""
        return TITLES.get(self.name, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON; gains are mappings of median, low and high."""
        return asdict(self)

    def to_flat(self) -> dict[str, Any]:
        """Return the row for a table: `over_fair` becomes `over_fair`, `over_fair_low` and `over_fair_high`."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                flat |= {name: value["median"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                flat[name] = value
        return flat


def ladder_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[LadderRow]:
    """Compute the ladder: the naive and the fair baseline, the chain in its order, then what stands beside it.

    Args:
        metrics: contents of `artifacts/evaluate/<variant>/metrics.json` by variant.

    Raises:
        UserError: if there is no variant, one is unknown, or one lacks a value.
    """
    unknown = sorted(set(metrics) - set(VARIANTS))
    if unknown or not metrics:
        raise UserError(f"ladder: {unknown or 'no variant'}: expected some of {', '.join(VARIANTS)}")
    measured = [_Evaluation(name, metrics[name]) for name in VARIANTS if name in metrics]
    rows: dict[str, LadderRow] = {}
    for evaluation in measured:
        parent = _measured_parent(evaluation.variant, rows)
        rows[evaluation.variant] = _variant(evaluation, rows[parent] if parent else None)
    return [*_baselines(measured, list(rows.values())), *rows.values()]


def fastest_within_floor(rows: Sequence[LadderRow]) -> LadderRow | None:
    """Return the variant with the highest throughput of those that meet the quality floor; None if none does."""
    good = [row for row in rows if not row.baseline and row.within_floor]
    return max(good, key=lambda row: row.over_fair.median, default=None)


def times_smaller(row: LadderRow, rows: Sequence[LadderRow]) -> float:
    """Return by how much a variant's file is smaller than that of the first variant, the fine-tuned model."""
    first = next(other for other in rows if not other.baseline)
    if not row.model_bytes or not first.model_bytes:
        return 1.0
    return first.model_bytes / row.model_bytes


def headline(rows: Sequence[LadderRow]) -> str:
    """Say in one sentence what the ladder came to: the fastest model that meets the floor."""
    best = fastest_within_floor(rows)
    if best is None:
        return "No exported model meets the quality floor."
    sentence = (
        f"The {best.title} model answers {rate(best.texts_per_second)} texts a second: "
        f"{times(best.over_fair.median)} the fair PyTorch baseline and {times(best.over_naive.median)} the naive one, "
        f"in a file {times(times_smaller(best, rows))} smaller"
    )
    if best.difference is None or best.low is None or best.high is None or best.confidence is None:
        return f"{sentence}."
    return (
        f"{sentence}, at {points(best.difference)} points of {best.metric.replace('_', ' ')} "
        f"({best.confidence:.0%} interval {points(best.low)} to {points(best.high)})."
    )


def times(value: float) -> str:
    """Write a gain for people: 1.04×, 7.2×, 260×."""
    digits = 2 if value < 2 else 1 if value < 20 else 0
    return f"{value:,.{digits}f}×"


def rate(value: float) -> str:
    """Write texts per second for people: 9.4, 3,560."""
    return f"{value:,.{0 if value >= 100 else 1}f}"


def points(share: float) -> str:
    """Write a difference of shares in percentage points with its sign: −0.4, +0.2, 0.0."""
    text = f"{share * 100:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


@dataclass(frozen=True)
class _Evaluation:
    """The metrics of one variant, with a clear word for a value that is not there."""

    variant: str
    metrics: Mapping[str, Any]

    def value(self, *names: str) -> Any:
        found: Any = self.metrics
        for name in names:
            if not isinstance(found, Mapping) or name not in found:
                raise UserError(
                    f"artifacts/evaluate/{self.variant}/metrics.json: has no {'.'.join(names)}; "
                    f"run `dvc repro --force --single-item evaluate@{self.variant}`"
                )
            found = found[name]
        return found

    def gain(self, name: str) -> Gain:
        return Gain(*(self.value("speedup", name, which) for which in ("median", "low", "high")))


def _measured_parent(variant: str, rows: Mapping[str, LadderRow]) -> str | None:
    """The nearest variant above this one that was measured."""
    parent = PARENTS.get(variant)
    while parent is not None and parent not in rows:
        parent = PARENTS.get(parent)
    return parent


def _variant(evaluation: _Evaluation, parent: LadderRow | None) -> LadderRow:
    value, over_fair = evaluation.value, evaluation.gain("throughput_over_fair")
    metric = value("against_reference", "metric")
    return LadderRow(
        name=evaluation.variant,
        baseline=False,
        parent=parent.name if parent else FAIR,
        metric=metric,
        quality=value("quality", metric),
        difference=value("against_reference", "difference"),
        low=value("against_reference", "low"),
        high=value("against_reference", "high"),
        confidence=value("against_reference", "confidence"),
        detectable=value("against_reference", "detectable_difference"),
        within_floor=value("against_reference", "within_floor"),
        latency_runtime=value("best", "latency_runtime"),
        latency_p50_ms=value("best", "latency_ms", "p50"),
        latency_p95_ms=value("best", "latency_ms", "p95"),
        throughput_runtime=value("best", "throughput_runtime"),
        batch_size=value("best", "batch_size"),
        texts_per_second=value("best", "texts_per_second"),
        model_bytes=value("size", "model_bytes"),
        parameters=value("size", "parameters"),
        peak_memory_mb=value("best", "peak_memory_mb"),
        over_parent=over_fair.median / (parent.over_fair.median if parent else 1.0),
        over_fair=over_fair,
        over_naive=evaluation.gain("throughput_over_naive"),
        latency_over_fair=evaluation.gain("latency_over_fair"),
        latency_over_naive=evaluation.gain("latency_over_naive"),
    )


def _baselines(measured: Sequence[_Evaluation], variants: Sequence[LadderRow]) -> list[LadderRow]:
    """Both baselines run the fine-tuned model and were timed beside every variant: the medians of those runs count."""
    throughput = [row.over_naive.median / row.over_fair.median for row in variants]
    latency = [row.latency_over_naive.median / row.latency_over_fair.median for row in variants]
    shared = _shared_by_baselines(variants[0])
    naive = LadderRow(
        name=NAIVE,
        parent=None,
        over_parent=None,
        over_fair=_spread([1 / ratio for ratio in throughput]),
        over_naive=_NO_GAIN,
        latency_over_fair=_spread([1 / ratio for ratio in latency]),
        latency_over_naive=_NO_GAIN,
        **shared,
        **_speed_of_baseline("naive", measured),
    )
    fair = LadderRow(
        name=FAIR,
        parent=NAIVE,
        over_parent=median(throughput),
        over_fair=_NO_GAIN,
        over_naive=_spread(throughput),
        latency_over_fair=_NO_GAIN,
        latency_over_naive=_spread(latency),
        **shared,
        **_speed_of_baseline("fair", measured),
    )
    return [naive, fair]


def _shared_by_baselines(first: LadderRow) -> dict[str, Any]:
    """The baselines are one model, the reference: its quality is that of a variant less the variant's difference."""
    return {
        "baseline": True,
        "metric": first.metric,
        "quality": first.quality - (first.difference or 0.0),
        "difference": None,
        "low": None,
        "high": None,
        "confidence": None,
        "detectable": None,
        "within_floor": True,
        "parameters": first.parameters if first.name == CHAIN[0] else None,
        "model_bytes": None,
        "peak_memory_mb": None,
    }


def _speed_of_baseline(name: str, measured: Sequence[_Evaluation]) -> dict[str, Any]:
    def across(*path: str) -> float:
        return float(median(evaluation.value("baselines", name, *path) for evaluation in measured))

    return {
        "latency_runtime": "PyTorch",
        "throughput_runtime": "PyTorch",
        "batch_size": None,
        "texts_per_second": across("texts_per_second"),
        "latency_p50_ms": across("latency_ms", "p50"),
        "latency_p95_ms": across("latency_ms", "p95"),
    }


def _spread(values: Sequence[float]) -> Gain:
    return Gain(median(values), min(values), max(values))

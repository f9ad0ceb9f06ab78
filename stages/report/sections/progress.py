"""The Moore's-law view: speed and quality of the champions by date, and how long speed takes to double."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from stages.core.artifacts import read_json
from stages.core.champions import CHAMPIONS, Champion, digest_of_test_split, read_champions
from stages.core.ladder import CHAIN, rate
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.report.doubling import FEWEST_DAYS, Doubling, fit_doubling
from stages.report.drawing import ACCENT, MUTED, SECOND, new_figure, style
from stages.report.sections import Section


@dataclass(frozen=True)
class Point:
    """A model on the way."""

    name: str
    day: date
    quality: float
    texts_per_second: float
    speedup: float
    machine: str
    comparable_speed: bool
    """Whether it was timed on the machine of the model at hand."""
    comparable_quality: bool
    """Whether it was judged by the same metric on the same test split as the model at hand."""


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Read the history and fit the doubling time; None where there is no stage `history`."""
    final = next((name for name in reversed(CHAIN) if f"evaluate@{name}" in inputs), None)
    if "history" not in inputs or final is None:
        return None
    about, metric = read_json(inputs["history"] / METRICS), params.quality.metric
    evaluation = read_json(inputs[f"evaluate@{final}"] / METRICS)
    machine = read_json(inputs["deploy_check"] / "details.json")["inventory"]["cpu"]["model"]
    own = _of_this(evaluation, about["day"], machine, metric)
    test_split = digest_of_test_split(inputs[f"evaluate@{final}"] / "predictions.parquet")
    champions = read_champions(inputs["history"] / CHAMPIONS)
    points = [_of_champion(champion, own, test_split, metric) for champion in champions]
    if evaluation["against_reference"]["within_floor"]:  # what misses the floor cannot become champion
        points.append(own)
    timed = [point for point in points if point.comparable_speed]
    fit = fit_doubling(
        [point.day for point in timed], [point.texts_per_second for point in timed], params.evaluate.confidence
    )
    return Section(
        identifier="progress",
        title="Progress over time",
        summary=_summary(fit, timed, bool(about["reached"])),
        context={
            "points": points,
            "fit": fit,
            "elsewhere": len(points) - len(timed),
            "reached": bool(about["reached"]),
            "metric": metric.replace("_", " "),
            "model": params.tracking.model_name,
        },
        figures={"progress": draw(timed, fit)} if len(timed) > 1 else {},
        descriptions={"progress": _description(timed)} if len(timed) > 1 else {},
    )


def draw(points: Sequence[Point], fit: Doubling | None) -> Figure:
    """Draw texts a second (logarithmic, with the fitted line) and quality over the days."""
    with style("draw"):
        figure = new_figure(7.0, 4.4)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        days = [point.day for point in points]
        upper.semilogy(days, [point.texts_per_second for point in points], "o", color=ACCENT, markersize=7, base=2)
        if fit is not None:
            first, last = min(days), max(days)
            ends = [fit.speed(0), fit.speed((last - first).days)]
            upper.semilogy([first, last], ends, color=SECOND, linewidth=1.4, linestyle=(0, (5, 3)), base=2)
        upper.set_ylabel("texts per second")
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        upper.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        judged = [point for point in points if point.comparable_quality]
        lower.plot([point.day for point in judged], [point.quality for point in judged], "o-", color=MUTED)
        lower.set_ylabel("quality")
        lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        locator = AutoDateLocator(maxticks=7)  # type: ignore[no-untyped-call]
        lower.xaxis.set_major_locator(locator)
        lower.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        for axes in (upper, lower):
            axes.grid(axis="y")
            axes.margins(x=0.04, y=0.15)
        return figure


def _of_champion(champion: Champion, own: Point, test_split: str, metric: str) -> Point:
    return Point(
        name=f"version {champion.version}",
        day=champion.day,
        quality=champion.quality,
        texts_per_second=champion.texts_per_second,
        speedup=champion.speedup,
        machine=champion.machine,
        comparable_speed=champion.machine == own.machine,
        comparable_quality=champion.metric == metric and champion.test_split == test_split,
    )


def _of_this(evaluation: Mapping[str, Any], day: str, machine: str, metric: str) -> Point:
    """The model at hand, as the next champion."""
    return Point(
        name="this model",
        day=date.fromisoformat(day),
        quality=evaluation["quality"][metric],
        texts_per_second=evaluation["best"]["texts_per_second"],
        speedup=evaluation["speedup"]["throughput_over_fair"]["median"],
        machine=machine,
        comparable_speed=True,
        comparable_quality=True,
    )


def _summary(fit: Doubling | None, points: Sequence[Point], reached: bool) -> str:
    if not reached:
        return "The registry could not be reached when this page was made, so there is no history."
    if fit is None:
        days = len({point.day for point in points})
        return (
            f"Too little history: {len(points)} model{'s' * (len(points) != 1)} on {days} day{'s' * (days != 1)}; "
            f"a doubling time needs {FEWEST_DAYS} champions on different days."
        )
    word = "doubles" if fit.slope > 0 else "halves"
    told = f"Speed {word} every {abs(fit.days):,.0f} days over {fit.points} models"
    if fit.low is None or fit.high is None:
        return f"{told}, but the {fit.confidence:.0%} interval does not exclude standing still."
    low, high = sorted((abs(fit.low), abs(fit.high)))
    return f"{told} ({fit.confidence:.0%} interval {low:,.0f} to {high:,.0f} days)."


def _description(points: Sequence[Point]) -> str:
    told = "; ".join(f"{point.day.isoformat()} {rate(point.texts_per_second)} texts a second" for point in points)
    return f"Speed and quality of the champions over time: {told}"

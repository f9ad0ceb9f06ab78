"""The Pareto front: which models no other model beats in quality and speed, or in quality and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.core.ladder import LadderRow
from stages.core.params import Params
from stages.report.drawing import ACCENT, GRID, INK, MUTED, new_figure, style
from stages.report.sections import Section
from stages.report.sources import Inputs, read_ladder

_LABEL_HEIGHTS = (8, -15, 20, -27)  # in points above the dot: neighbours' names keep apart


@dataclass(frozen=True)
class Place:
    """Where a model stands on one of the two fronts."""

    row: LadderRow
    cost: float
    """What is to be small: seconds or bytes, up to a constant factor."""
    beaten_by: tuple[str, ...]
    """Titles of the models that are at least as good in both respects and better in one; empty on the front."""


def section(inputs: Inputs, params: Params) -> Section:
    """Tell which models are worth having at all."""
    rows = [row for row in read_ladder(inputs) if not row.baseline]
    speed = places(rows, lambda row: 1.0 / row.over_fair.median)
    size = places([row for row in rows if row.model_bytes], lambda row: float(row.model_bytes or 0))
    with style("draw"):
        figures = {
            "pareto_speed": front(speed, lambda row: row.texts_per_second, "texts per second", larger=True),
            "pareto_size": front(size, lambda row: (row.model_bytes or 0) / 2**20, "file, MiB", larger=False),
        }
    return Section(
        identifier="pareto",
        title="Quality against speed and size",
        summary=_summary(speed, size),
        context={"speed": speed, "size": {place.row.name: place for place in size}},
        figures=figures,
        descriptions={
            "pareto_speed": f"Quality against texts per second. On the front: {_on_front(speed)}",
            "pareto_size": f"Quality against file size. On the front: {_on_front(size)}",
        },
    )


def places(rows: Sequence[LadderRow], cost: Callable[[LadderRow], float]) -> list[Place]:
    """Find for every model those that dominate it.

    Args:
        rows: of the ladder.
        cost: what is to be small.
    """
    return [Place(row, cost(row), tuple(other.title for other in rows if _beats(other, row, cost))) for row in rows]


def _beats(one: LadderRow, other: LadderRow, cost: Callable[[LadderRow], float]) -> bool:
    no_worse = one.quality >= other.quality and cost(one) <= cost(other)
    return no_worse and (one.quality > other.quality or cost(one) < cost(other))


def _on_front(found: Sequence[Place]) -> str:
    return ", ".join(place.row.title for place in found if not place.beaten_by)


def _summary(speed: Sequence[Place], size: Sequence[Place]) -> str:
    beaten_in_size = {place.row.name for place in size if place.beaten_by}
    names = ", ".join(place.row.title for place in speed if place.beaten_by and place.row.name in beaten_in_size)
    best = f"On the front of quality and speed: {_on_front(speed)}."
    return f"{best} Beaten in speed and in size: {names}." if names else f"{best} No model is beaten in both."


def front(found: Sequence[Place], measure: Callable[[LadderRow], float], label: str, larger: bool) -> Figure:
    """Draw quality with its interval against what it costs; dominated models are grey.

    Args:
        found: every model with those that beat it.
        measure: the position on the horizontal axis.
        label: of that axis.
        larger: whether more is better there.
    """
    figure = new_figure(4.2, 3.3)
    axes = figure.subplots()
    best = sorted((place for place in found if not place.beaten_by), key=lambda place: measure(place.row))
    xs, ys = [measure(place.row) for place in best], [100 * place.row.quality for place in best]
    axes.step(xs, ys, where="pre" if larger else "post", color=ACCENT, linewidth=1.2, alpha=0.6)
    for number, place in enumerate(sorted(found, key=lambda place: measure(place.row))):
        row, colour = place.row, MUTED if place.beaten_by else ACCENT
        x, y = measure(row), 100 * row.quality
        if row.low is not None and row.high is not None and row.difference is not None:
            below, above = row.difference - row.low, row.high - row.difference
            axes.vlines(x, y - 100 * below, y + 100 * above, color=colour, linewidth=2, alpha=0.35)
        axes.plot(x, y, "o", color=colour, markersize=5 if place.beaten_by else 8)
        axes.annotate(
            row.title,
            (x, y),
            xytext=(0, _LABEL_HEIGHTS[number % len(_LABEL_HEIGHTS)]),
            textcoords="offset points",
            color=colour if place.beaten_by else INK,
            fontsize=8,
            ha="center",
            weight="normal" if place.beaten_by else "bold",
        )
    measured = [measure(place.row) for place in found]
    axes.set_xlim(0, max(measured) * 1.18)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel(f"{label} ({'more' if larger else 'less'} is better)")
    axes.set_ylabel(found[0].row.metric.replace("_", " "))
    axes.grid(color=GRID)
    return figure

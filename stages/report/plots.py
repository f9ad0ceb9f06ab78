"""The pictures of the report, each a function from figures to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from stages.core.ladder import LadderRow, fastest_within_floor, points, rate, times
from stages.report.drawing import ACCENT, BAD, GRID, INK, MUTED, PAPER, SECOND, WASH, bare, new_figure

_MOST_LABELLED_CELLS = 14  # a confusion matrix of more classes shows colours only
_MOST_NAMED_CLASSES = 30


def ladder(rows: Sequence[LadderRow], floor: float, narrow: bool = False) -> Figure:
    """Draw throughput and quality of every rung on shared rows: how far up, and at what price.

    Args:
        rows: of the ladder, slowest baseline first.
        floor: how much quality a model may lose, as a share.
        narrow: one chart under the other, for a phone.
    """
    height = 0.42 * len(rows) + 0.75
    if narrow:
        figure = new_figure(3.7, 2 * height)
        speed, quality = figure.subplots(2, 1, gridspec_kw={"hspace": 0.12})
    else:
        figure = new_figure(9.4, height)
        speed, quality = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    _ladder_speed(speed, rows, narrow)
    _ladder_quality(quality, rows, floor, named=narrow)
    return figure


def _ladder_speed(axes: Axes, rows: Sequence[LadderRow], narrow: bool) -> None:
    best = fastest_within_floor(rows)
    speeds = [row.texts_per_second for row in rows]
    left = min(speeds) / 1.6
    for height, row in enumerate(rows):
        colour = MUTED if row.baseline else ACCENT
        axes.hlines(height, left, row.texts_per_second, color=colour, linewidth=5 if row == best else 3)
        axes.plot(row.texts_per_second, height, "o", color=colour, markersize=9 if row == best else 7)
        gain = "" if row.baseline else f" · {times(row.over_fair.median)}"
        if row == best and not narrow:
            gain = f"{gain} fair, {times(row.over_naive.median)} naive"
        axes.annotate(
            f"{rate(row.texts_per_second)}{gain}",
            (row.texts_per_second, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if row == best else "normal",
        )
    axes.set_xscale("log")
    # The labels stand right of the dots: leave them room.
    axes.set_xlim(left, max(speeds) * (max(speeds) / left) ** (0.45 if narrow else 0.6))
    decades = 10.0 ** numpy.arange(numpy.ceil(numpy.log10(left)), numpy.log10(max(speeds)) + 0.2)
    axes.set_xticks(decades)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("Texts/s (log scale), × fair" if narrow else "Texts per second (log scale), × fair PyTorch")
    _rows_as_names(axes, rows, named=True)


def _ladder_quality(axes: Axes, rows: Sequence[LadderRow], floor: float, named: bool) -> None:
    lows = [100 * row.low for row in rows if row.low is not None]
    highs = [100 * row.high for row in rows if row.high is not None]
    reach = max([100 * floor, *(abs(value) for value in lows + highs)]) * 1.15
    axes.axvspan(-2 * reach, -100 * floor, color=WASH, linewidth=0)
    axes.axvline(-100 * floor, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.axvline(0, color=MUTED, linewidth=0.9)
    for height, row in enumerate(rows):
        difference = 100 * (row.difference or 0.0)
        colour = MUTED if row.baseline else ACCENT if row.within_floor else BAD
        if row.low is not None and row.high is not None:
            axes.hlines(height, 100 * row.low, 100 * row.high, color=colour, linewidth=2)
        axes.plot(
            difference, height, "o", color=colour, markersize=7, markerfacecolor=PAPER if row.baseline else colour
        )
        axes.annotate(
            f"{row.quality:.1%}",
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"{rows[0].metric.replace('_', ' ').capitalize()}: points against fine-tuned")
    axes.annotate(
        f"floor {points(-floor)}",
        (-100 * floor, len(rows) - 0.45),
        xytext=(-3, 0),
        textcoords="offset points",
        color=BAD,
        fontsize=8,
        ha="right",
        va="center",
    )
    _rows_as_names(axes, rows, named)


def _rows_as_names(axes: Axes, rows: Sequence[LadderRow], named: bool) -> None:
    bare(axes)
    axes.set_ylim(len(rows) - 0.3, -0.6)
    axes.set_yticks(range(len(rows)), [row.title for row in rows] if named else [""] * len(rows))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")


def curves(history: pandas.DataFrame, held_out: str, label: str) -> Figure:
    """Draw training loss and the loss on texts not trained on, over steps.

    Args:
        history: a row per logged step, empty where a curve has no point; trainings that `training` tells apart are
            lines of their own.
        held_out: name of the column with the other loss.
        label: what to call it.
    """
    figure = new_figure(4.0, 2.6)
    axes = figure.subplots()
    trainings = history.get("training", 1)
    for number, (_, part) in enumerate(history.assign(training=trainings).groupby("training")):
        names = ("training", label) if number == 0 else (None, None)
        train = part.dropna(subset=["train_loss"])
        axes.plot(train["step"], train["train_loss"], color=ACCENT, linewidth=1.2, label=names[0])
        if held_out in part:
            other = part.dropna(subset=[held_out])
            axes.plot(other["step"], other[held_out], "o-", color=SECOND, linewidth=1.6, markersize=4, label=names[1])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y")
    axes.legend(loc="best")
    return figure


def confusion(table: pandas.DataFrame) -> Figure:
    """Draw which class was taken for which: rows are the truth, colours the share of the row, numbers the texts.

    Args:
        table: texts counted by actual (rows) and predicted (columns) class, both in the same order.
    """
    classes = len(table)
    side = min(3.0 + 0.3 * classes, 9.0)
    figure = new_figure(side, side * 0.92)
    axes = figure.subplots()
    counts = table.to_numpy()
    shares = counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), count in numpy.ndenumerate(counts):
        share = float(shares[row, column])
        if count:  # an opacity, not a colour map, so that the page can choose the colour
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=ACCENT, alpha=share, linewidth=0))
        if classes <= _MOST_LABELLED_CELLS:
            text = f"{count:,}" if count else "·"
            axes.text(column, row, text, ha="center", va="center", color=PAPER if share > 0.5 else INK)
    axes.set_xlim(-0.5, classes - 0.5)
    axes.set_ylim(classes - 0.5, -0.5)
    axes.set_aspect("equal")
    step = max(1, -(-classes // _MOST_NAMED_CLASSES))
    names = [_short(str(name)) for name in table.columns]
    axes.set_xticks(range(0, classes, step), names[::step], rotation=90 if max(map(len, names)) > 5 else 0)
    axes.set_yticks(range(0, classes, step), names[::step])
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    bare(axes)
    return figure


def lengths(table: pandas.DataFrame) -> Figure:
    """Draw how long the texts are, all splits together.

    Args:
        table: columns length (tokens) and count.
    """
    figure = new_figure(4.0, 2.6)
    axes = figure.subplots()
    total = table.groupby("length")["count"].sum()
    axes.bar(total.index, total, width=0.9, color=ACCENT)
    axes.set_xlabel("tokens per text")
    axes.set_ylabel("texts")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y")
    return figure


def trade_off(table: pandas.DataFrame, chosen: Mapping[str, float], tolerated: float) -> Figure:
    """Draw what a cascade loses against its larger model over the share of the texts that it passes on.

    Args:
        table: columns passed_on, difference, low and high, a row per threshold.
        chosen: the row that was taken.
        tolerated: how much quality the lower end of the interval may lose, as a share.
    """
    figure = new_figure(4.0, 3.1)
    axes = figure.subplots()
    ordered = table.sort_values("passed_on")
    shares = 100 * ordered["passed_on"]
    axes.fill_between(shares, 100 * ordered["low"], 100 * ordered["high"], color=GRID, linewidth=0)
    axes.plot(shares, 100 * ordered["difference"], color=ACCENT, linewidth=1.6)
    axes.axhline(-100 * tolerated, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.plot(100 * chosen["passed_on"], 100 * chosen["difference"], "o", color=ACCENT, markersize=8)
    axes.set_xlabel("texts passed on, %")
    axes.set_ylabel("points against the larger model")
    axes.grid(axis="y")
    return figure


def _short(name: str, longest: int = 14) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"

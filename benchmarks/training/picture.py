"""docs/training.png: how fast, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.training.contenders import Contender
from benchmarks.training.summary import PretrainRow

_INK, _GRID = "#22262b", "#e3e5e8"
_OURS = ("#0b6e4f", "#54b58f")
_THEIRS = ("#8a8f98", "#b0702a", "#4a6fa5", "#7a4a8c")


def draw(
    rows: Sequence[PretrainRow], runs: Mapping[str, Sequence[Any]], contenders: Sequence[Contender], path: Path
) -> None:
    """Draw tokens a second, held-out loss against seconds, and accuracy against seconds (all runs, all rounds)."""
    figure = Figure(figsize=(14, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    speed, loss, accuracy = figure.subplots(1, 3)
    colours = _colours(contenders)
    _draw_speed(speed, rows, colours)
    for axes, task, title in (
        (loss, "pretrain", "held-out loss against seconds of training"),
        (accuracy, "finetune", "validation accuracy against seconds of training"),
    ):
        for contender in (each for each in contenders if each.task == task):
            _draw_curves(axes, contender, runs.get(contender.name, []), colours[contender.name])
        axes.set_title(title, loc="left", fontsize=10)
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
        _bare(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _colours(contenders: Sequence[Contender]) -> dict[str, str]:
    found: dict[str, str] = {}
    for task in ("pretrain", "finetune"):
        ours, theirs = iter(_OURS), iter(_THEIRS)
        found |= {each.name: next(ours if each.headroom else theirs) for each in contenders if each.task == task}
    return found


def _draw_speed(axes: Axes, rows: Sequence[PretrainRow], colours: Mapping[str, str]) -> None:
    for height, row in enumerate(reversed(rows)):
        middle = float(numpy.median(row.tokens_per_second))
        axes.barh(height, middle, color=colours[row.contender.name], height=0.6)
        axes.hlines(height, min(row.tokens_per_second), max(row.tokens_per_second), color=_INK, linewidth=1)
        axes.text(0, height + 0.34, f"{row.contender.title}: {middle:,.0f}", fontsize=8, color=_INK, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(rows))
    axes.set_title("pretraining: tokens of texts trained a second", loc="left", fontsize=10)
    _bare(axes)


def _draw_curves(axes: Axes, contender: Contender, runs: Sequence[Any], colour: str) -> None:
    for number, run in enumerate(run for run in runs if run["curve"]):
        seconds, values = [point[1] for point in run["curve"]], [point[2] for point in run["curve"]]
        axes.plot(seconds, values, "o-", color=colour, markersize=3, label=None if number else contender.title)


def _bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=_GRID)
    axes.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

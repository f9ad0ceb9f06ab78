"""docs/benchmarks.png: how fast and how good, one panel a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.summary import Row

_OURS, _THEIRS, _INK, _GRID = "#0b6e4f", "#8a8f98", "#22262b", "#e3e5e8"
_ROW_INCHES = 0.27
_WIDTH = 11.0


def draw(panels: Mapping[str, Sequence[Row]], floor: float, path: Path) -> None:
    """Draw texts a second (log scale, least and greatest round) beside quality lost (with interval), fastest on top."""
    shown = {
        name: sorted((row for row in rows if not row.error), key=lambda row: row.texts_per_second)
        for name, rows in panels.items()
    }
    heights = [len(rows) * _ROW_INCHES + 1.0 for rows in shown.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.6, 1), height_ratios=heights)
    for (name, rows), (speed, quality) in zip(shown.items(), axes, strict=True):
        _draw_speed(speed, name, rows)
        _draw_quality(quality, rows, floor)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _draw_speed(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    for height, row in enumerate(rows):
        middle, colour = row.texts_per_second, _colour(row)
        axes.barh(height, middle, color=colour, height=0.66)
        axes.hlines(height, min(row.throughput), max(row.throughput), color=_INK, linewidth=1)
        text = f" {middle:,.0f}" if middle >= 100 else f" {middle:.1f}"
        axes.annotate(
            text,
            (max(row.throughput), height),
            va="center",
            color=_INK,
            fontsize=8,
            xytext=(2, 0),
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.set_xlim(min(min(row.throughput) for row in rows) / 1.5, max(max(row.throughput) for row in rows) * 1.8)
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_OURS if row.headroom else _INK)
        label.set_fontweight("bold" if row.headroom else "normal")
    axes.set_title(f"{name}: texts a second", loc="left", fontsize=10)
    _bare(axes, len(rows))


def _draw_quality(axes: Axes, rows: Sequence[Row], floor: float) -> None:
    axes.axvline(0, color=_INK, linewidth=1)
    axes.axvline(-100 * floor, color=_INK, linewidth=1, linestyle=":")
    for height, row in enumerate(rows):
        axes.hlines(height, 100 * row.low, 100 * row.high, color=_colour(row), linewidth=2)
        axes.plot(100 * row.difference, height, "o", color=_colour(row), markersize=5)
    axes.set_yticks([])
    axes.set_title("points against fine-tuned; dotted: floor", loc="left", fontsize=10)
    _bare(axes, len(rows))


def _colour(row: Row) -> str:
    return _OURS if row.headroom else _THEIRS


def _bare(axes: Axes, rows: int) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=_GRID)
    axes.tick_params(labelsize=8, length=0)
    axes.set_ylim(-0.6, rows - 0.4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

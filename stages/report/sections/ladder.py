"""The performance ladder: what each step multiplied, what it cost, and every rung in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from stages.core.ladder import CHAIN, PARENTS, LadderRow, fastest_within_floor, points, rate, times
from stages.core.params import Params
from stages.report import plots
from stages.report.drawing import ACCENT, BAD, GOOD, INK, MUTED, bare, new_figure, style
from stages.report.sections import Section
from stages.report.sources import Inputs, final_variant, read_evaluations, read_ladder

_STEPS = {
    "finetune": "export and runtime",
    "distill": "distillation",
    "prune": "pruning",
    "quantize": "quantization",
    "quantize_finetuned": "quantization only",
    "cascade": "cascade",
}
"""What made a variant from its parent."""
_TICKS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True)
class Step:
    """One step of the way from fair PyTorch to a model."""

    what: str
    factor: float
    """Throughput over that of the step before."""
    before: float
    """Throughput over fair PyTorch where the step starts."""
    points: float
    """Quality that the step cost or won, as a share."""
    points_before: float

    @property
    def after(self) -> float:
        """Throughput over fair PyTorch where the step ends."""
        return self.before * self.factor


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the ladder; there is always one."""
    rows, floor = read_ladder(inputs), params.quality.floor
    best, steps = fastest_within_floor(rows), steps_of(rows)
    with style("draw"):
        figures = {
            "waterfall": waterfall(steps),
            "waterfall_narrow": waterfall(steps, narrow=True),
            "ladder": plots.ladder(rows, floor),
            "ladder_narrow": plots.ladder(rows, floor, narrow=True),
        }
    contributions = "; ".join(f"{step.what} {times(step.factor)}, {points(step.points)} points" for step in steps)
    models = "; ".join(
        f"{row.title} {rate(row.texts_per_second)} texts a second, {row.metric.replace('_', ' ')} {row.quality:.1%}"
        for row in rows
    )
    fall = f"What each step multiplied the throughput by, and what it did to quality: {contributions}"
    described = f"Throughput and quality of every model: {models}"
    final = read_evaluations(inputs)[final_variant(inputs)]
    return Section(
        identifier="ladder",
        title="The performance ladder",
        summary=_summary(steps),
        context={
            "rows": rows,
            "best": best,
            "steps": steps,
            "floor": floor,
            "settings": params.evaluate,
            "texts": final["texts"],
            "padded_to": final["baselines"]["naive"]["padded_to"],
        },
        figures=figures,
        descriptions={
            "waterfall": fall, "waterfall_narrow": fall, "ladder": described, "ladder_narrow": described
        },
    )  # fmt: skip


def steps_of(rows: Sequence[LadderRow]) -> list[Step]:
    """List the steps to the fastest model within the floor; where there is none, to the last of the chain."""
    last = next(row for name in reversed(CHAIN) for row in rows if row.name == name)
    return steps_to(fastest_within_floor(rows) or last, rows)


def steps_to(row: LadderRow, rows: Sequence[LadderRow]) -> list[Step]:
    """List the steps that lead from fair PyTorch to one model, in order.

    Their factors multiply to the model's gain over fair PyTorch, and their points add up to its difference.
    """
    by_name = {other.name: other for other in rows if not other.baseline}
    path = [row]
    while (parent := _parent(path[-1], by_name)) is not None:
        path.append(parent)
    steps: list[Step] = []
    speed, quality = 1.0, 0.0
    for rung in reversed(path):
        gain, difference = rung.over_fair.median, rung.difference or 0.0
        steps.append(Step(_STEPS[rung.name], gain / speed, speed, difference - quality, quality))
        speed, quality = gain, difference
    return steps


def _parent(row: LadderRow, rows: dict[str, LadderRow]) -> LadderRow | None:
    name = PARENTS.get(row.name)
    while name is not None and name not in rows:
        name = PARENTS.get(name)
    return None if name is None else rows[name]


def _summary(steps: Sequence[Step]) -> str:
    largest = max(steps, key=lambda step: step.factor)
    return (
        f"{len(steps)} steps multiply to {times(steps[-1].after)} the throughput of fair PyTorch; "
        f"the largest is {largest.what}, {times(largest.factor)}."
    )


def waterfall(steps: Sequence[Step], narrow: bool = False) -> Figure:
    """Draw what each step multiplied the throughput by, and beside it what it did to quality.

    On a logarithmic scale factors are lengths, so the bars add up to the whole (Cleveland & McGill, 1984).

    Args:
        steps: from `steps_to`.
        narrow: one chart under the other, for a phone.
    """
    height = 0.42 * (len(steps) + 1) + 0.75
    if narrow:
        figure = new_figure(3.7, 2 * height)
        speed, quality = figure.subplots(2, 1, gridspec_kw={"hspace": 0.12})
    else:
        figure = new_figure(9.4, height)
        speed, quality = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    _fall_of_speed(speed, steps, narrow)
    _fall_of_quality(quality, steps, named=narrow)
    return figure


def _fall_of_speed(axes: Axes, steps: Sequence[Step], narrow: bool) -> None:
    reached = [1.0, *(step.after for step in steps)]
    for height, step in enumerate(steps):
        left, right = sorted((step.before, step.after))
        colour = ACCENT if step.factor >= 1 else BAD
        axes.barh(height, right - left, left=left, height=0.62, color=colour)
        _connect(axes, height, step.after)
        _name(axes, right, height, times(step.factor))
    total = steps[-1].after
    axes.barh(len(steps), abs(total - 1.0), left=min(1.0, total), height=0.62, color=MUTED)
    _name(axes, max(1.0, total), len(steps), times(total), bold=True)
    axes.set_xscale("log")
    low, high = min(reached), max(reached)
    axes.set_xlim(low / 1.08, high * max(1.3, (high / low) ** (0.25 if narrow else 0.12)))
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_title("Throughput over fair PyTorch" if narrow else "Throughput over fair PyTorch (log scale)")
    _steps_as_names(axes, steps, named=True)


def _fall_of_quality(axes: Axes, steps: Sequence[Step], named: bool) -> None:
    reached = [0.0, *(100 * (step.points_before + step.points) for step in steps)]
    for height, step in enumerate(steps):
        start, change = 100 * step.points_before, 100 * step.points
        axes.barh(height, change, left=start, height=0.62, color=GOOD if change >= 0 else BAD)
        _connect(axes, height, start + change)
        _name(axes, max(start, start + change), height, points(step.points))
    axes.barh(len(steps), reached[-1], height=0.62, color=MUTED)
    _name(axes, max(0.0, reached[-1]), len(steps), points(reached[-1] / 100), bold=True)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    room = max(max(reached) - min(reached), 0.2)
    axes.set_xlim(min(reached) - 0.15 * room, max(reached) + 0.35 * room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
    axes.set_title("Quality, points" if named else "Quality, points against fine-tuned")
    _steps_as_names(axes, steps, named)


def _connect(axes: Axes, height: int, place: float) -> None:
    axes.plot([place, place], [height + 0.31, height + 0.69], color=MUTED, linewidth=0.9)


def _name(axes: Axes, place: float, height: int, text: str, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.annotate(text, (place, height), xytext=(5, 0), textcoords="offset points", va="center", weight=weight)


def _steps_as_names(axes: Axes, steps: Sequence[Step], named: bool) -> None:
    bare(axes)
    names = [*(step.what for step in steps), "together"]
    axes.set_ylim(len(steps) + 0.6, -0.6)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")

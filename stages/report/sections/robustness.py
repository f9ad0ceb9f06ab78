"""What models lose on changed texts and in other domains, and whether they notice foreign ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.core.artifacts import read_json
from stages.core.ladder import CHAIN, TITLES, VARIANTS, points
from stages.core.params import Params
from stages.core.tables import read_table
from stages.report.drawing import ACCENT, GRID, INK, MUTED, bare, new_figure, style
from stages.report.sections import Section

REFERENCE = "finetune"

_DARKEST_DROP = 0.2
"""Loss of accuracy at which a cell of the heat table is as dark as it gets."""
_EXAMPLES_EACH = 2
_ROW_INCHES = 0.34
_NAMES = {"length": "a sentence added", "look_alikes": "look-alike letters", "word_drop": "words left out"}


@dataclass(frozen=True)
class Cell:
    """One model under one perturbation."""

    accuracy: float
    drop: float
    hurts_more: bool
    """Whether it surely loses more than the reference."""

    @property
    def heat(self) -> int:
        """How dark the cell is, in percent."""
        return round(100 * min(1.0, max(0.0, self.drop) / _DARKEST_DROP))


@dataclass(frozen=True)
class Row:
    """One perturbation."""

    name: str
    changed: float
    """Share of the copies that differ from their text."""
    cells: list[Cell | None]
    """By model; None where one was not perturbed so."""
    worst_case: float
    """Of the final model: share of texts with the answers to all copies right."""


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Tell what the final model loses beside the fine-tuned one; None where no robustness was measured."""
    found = {name: inputs[f"robustness@{name}"] for name in VARIANTS if f"robustness@{name}" in inputs}
    if not found:
        return None
    metrics = {name: read_json(folder / "metrics.json") for name, folder in found.items()}
    final = next((name for name in reversed(CHAIN) if name in metrics), next(iter(metrics)))
    own = metrics[final]
    worse = [name for name, row in own["perturbations"].items() if row["hurts_more"]]
    with style("draw"):
        figure = draw_drops(own, metrics[REFERENCE] if REFERENCE in metrics and final != REFERENCE else None, final)
    return Section(
        identifier="robustness",
        title="Changed texts, other domains, foreign texts",
        summary=summarize(own, final, worse),
        context={
            "final": final,
            "own": own,
            "models": list(metrics),
            "clean": [each["accuracy"] for each in metrics.values()],
            "everywhere": [each.get("right_everywhere") for each in metrics.values()],
            "rows": heat_rows(metrics, final),
            "sensitivity": {_title(name): row for name, row in own["sensitivity"].items()},
            "worse": [(_title(name), own["perturbations"][name]) for name in worse],
            "shift": shift_rows(metrics),
            "detection": detection_rows(metrics),
            "no_detection": own["out_of_distribution"].get("reason"),
            "examples": read_examples(found[final]),
        },
        figures={"robustness": figure},
        descriptions={"robustness": describe(own, final)},
        alarm=bool(worse),
    )


def summarize(own: Mapping[str, Any], final: str, worse: Sequence[str]) -> str:
    """Say in one sentence how the final model fares on changed texts."""
    rows = own["perturbations"]
    if not rows:
        return "No perturbation that keeps the label was tried."
    start = (
        f"Over {len(rows)} ways to change a text the {TITLES[final]} model is right on {own['mean_accuracy']:.1%} "
        f"({own['accuracy']:.1%} on clean texts), least under {_title(own['worst_perturbation'])}, "
        f"{own['worst_accuracy']:.1%}"
    )
    if final == REFERENCE:
        return f"{start}."
    if not worse:
        return f"{start}; under none does it surely lose more than the fine-tuned model."
    most = max(worse, key=lambda name: float(rows[name]["extra_drop"]))
    named = " and ".join(_title(name) for name in worse)
    return (
        f"{start}; it surely loses more than the fine-tuned model under {named}, "
        f"{points(rows[most]['extra_drop'])} points under {_title(most)}."
    )


def heat_rows(metrics: Mapping[str, Mapping[str, Any]], final: str) -> list[Row]:
    """Make a row for each perturbation that keeps the label, the one that costs the final model most first."""
    own = metrics[final]["perturbations"]
    return [
        Row(
            name=_title(name),
            changed=row["changed"],
            cells=[_cell(each["perturbations"].get(name)) for each in metrics.values()],
            worst_case=row["worst_case"],
        )
        for name, row in sorted(own.items(), key=lambda item: float(item[1]["accuracy"]))
    ]


def shift_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a row for each model and domain, none where there is only the task's own."""
    rows = [
        {"model": TITLES[name], "domain": domain, **row}
        for name, each in metrics.items()
        for domain, row in sorted(each["shift"].items(), key=lambda item: item[0] != "test")
    ]
    return rows if any(row["domain"] != "test" for row in rows) else []


def detection_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a row for each model and kind of foreign text; `energy` is None where a model has none."""
    return [
        {
            "model": TITLES[name],
            "foreign": foreign,
            "texts": row["texts"],
            "max_probability": row["max_probability"],
            "energy": None if "reason" in row["energy"] else row["energy"],
        }
        for name, each in metrics.items()
        if "reason" not in each["out_of_distribution"]
        for foreign, row in each["out_of_distribution"].items()
    ]


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """Read a few texts that the final model gets wrong once changed, the surest mistakes of each perturbation."""
    every = read_table(folder / "examples.parquet", "parquet", "utf-8")
    table = every.groupby("perturbation", sort=False).head(_EXAMPLES_EACH)
    names = [_title(name) for name in table["perturbation"]]
    return [
        {str(key): value for key, value in row.items()} for row in table.assign(perturbation=names).to_dict("records")
    ]


def draw_drops(own: Mapping[str, Any], reference: Mapping[str, Any] | None, final: str) -> Figure:
    """Draw what each perturbation costs, with intervals, the final model above the reference."""
    names = sorted(own["perturbations"], key=lambda name: float(own["perturbations"][name]["drop"]))
    figure = new_figure(7.2, 1.0 + _ROW_INCHES * max(1, len(names)))
    axes = figure.subplots()
    axes.axvline(0.0, color=GRID)
    apart = 0.0 if reference is None else 0.16
    _draw_model(axes, own, names, apart, ACCENT, TITLES[final])
    if reference is not None:
        _draw_model(axes, reference, names, -apart, MUTED, TITLES[REFERENCE])
    axes.set_yticks(range(len(names)), [_title(name) for name in names], color=INK)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("points of accuracy lost against the clean texts")
    axes.grid(axis="x")
    axes.legend(loc="lower right")
    bare(axes)
    return figure


def _draw_model(
    axes: Axes, metrics: Mapping[str, Any], names: Sequence[str], above: float, colour: str, title: str
) -> None:
    rows = [metrics["perturbations"][name] for name in names]
    places = [place + above for place in range(len(names))]
    low, high = ([100 * row[end] for row in rows] for end in ("drop_low", "drop_high"))
    axes.hlines(places, low, high, color=colour, linewidth=1.6)
    axes.plot([100 * row["drop"] for row in rows], places, "o", color=colour, markersize=4.5, label=title)


def describe(own: Mapping[str, Any], final: str) -> str:
    """Say in words what the picture shows."""
    drops = [f"{_title(name)} {points(row['drop'])}" for name, row in own["perturbations"].items()]
    return f"Points of accuracy that the {TITLES[final]} model loses on changed texts: {', '.join(drops)}."


def _cell(row: Mapping[str, Any] | None) -> Cell | None:
    return None if row is None else Cell(row["accuracy"], row["drop"], row["hurts_more"])


def _title(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))

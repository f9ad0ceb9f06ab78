"""How good every model is, how sure that is, and what is wrong with it if anything is.

The models are several and the test texts the same, so p-values are corrected together (Holm). One claim stands alone:
that the final model is not worse than the fine-tuned one by the floor. It was fixed in `params.yaml` before any model
was seen, and needs no correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest

from stages.core import tables
from stages.core.artifacts import read_json
from stages.core.ladder import CHAIN, PARENTS, TITLES, VARIANTS, points
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.core.statistics import Corrected, compare_variants
from stages.report.drawing import ACCENT, BAD, GOOD, GRID, INK, MUTED, SECOND, bare, new_figure, settle, style
from stages.report.sections import Section
from stages.report.sources import read_numbers, read_table

FAR_TEMPERATURE = 2.0
"""A temperature beyond this or its inverse: the log-odds of every answer are off by more than a factor of two, which
label smoothing or a little overfitting does not do (Guo et al. 2017 fitted 1.1 to 2.5 to networks they call badly
calibrated)."""
EXAMPLES_OF_A_KIND = 4
KINDS = {"right_to_wrong": "lost", "wrong_to_right": "won", "wrong_to_wrong": "moved"}

_COLOURS = (ACCENT, SECOND, GOOD, BAD, MUTED, INK)
_MARKERS = ("o", "^", "s", "D")
_LONGEST_NAME = 18
_BAR = 0.012


@dataclass(frozen=True)
class Comparison:
    """A variant against one other model on the same texts."""

    title: str
    other: str
    """What people call the other model."""
    against: Mapping[str, Any]
    """From the metrics of `evaluate`."""
    mcnemar: Corrected
    verdict: str
    """Of non-inferiority, in words."""
    good: bool


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Tell quality, comparisons and faults of every variant that was evaluated; None where none was."""
    folders = {name: inputs[f"evaluate@{name}"] for name in VARIANTS if f"evaluate@{name}" in inputs}
    final = next((name for name in reversed(CHAIN) if name in folders), None)
    if final is None:
        return None
    metrics = {name: read_json(folder / METRICS) for name, folder in folders.items()}
    confusions = {name: read_table(folder / "confusion.csv", "actual", "predicted") for name, folder in folders.items()}
    faults = find_faults(metrics, confusions, final)
    first = next(iter(folders))
    with style("draw"):
        figures = {
            "quality_reliability": draw_reliability(*_reliability(folders[final])),
            "quality_embeddings": draw_maps(
                {TITLES[name]: _places(folders[name]) for name in dict.fromkeys((first, final))}
            ),
        }
        for figure in figures.values():
            settle(figure)
    flips = read_table(folders[final] / "flips.csv", "against")
    return Section(
        identifier="quality",
        title="Quality, and how sure it is",
        summary=" ".join([*faults, _summary(metrics[final], final)]),
        context={
            "faults": faults,
            "variants": [{"title": TITLES[name], **values} for name, values in metrics.items()],
            "against_reference": _comparisons(metrics, "reference", final),
            "against_parent": _comparisons(metrics, "parent", final),
            "final": metrics[final],
            "final_title": TITLES[final],
            "first_title": TITLES[first],
            "per_class": _per_class(metrics[first], metrics[final]),
            "examples": _examples(flips[flips["against"] == "reference"]),
            "confidence": params.evaluate.confidence,
            "floor": params.quality.floor,
            "p": _p_value,
        },
        figures=figures,
        descriptions={
            "quality_reliability": f"Share of right predictions against confidence of the {TITLES[final]} model, "
            "with a diagonal for perfect calibration; the errors are in the table",
            "quality_embeddings": f"Test texts in the plane, coloured by label, of the {TITLES[first]} and the "
            f"{TITLES[final]} model; the silhouettes are in the table",
        },
        alarm=bool(faults),
    )


def find_faults(
    metrics: Mapping[str, Mapping[str, Any]], confusions: Mapping[str, pandas.DataFrame], final: str
) -> list[str]:
    """Say in a sentence each what the reader must know before trusting a model.

    Args:
        metrics: of `evaluate`, by variant.
        confusions: columns actual and predicted, a row a text, by variant.
        final: the variant that gets deployed.
    """
    swapped = [
        f"The {TITLES[name]} model takes {one} for {other} and {other} for {one}: their labels look swapped."
        for name, table in confusions.items()
        for one, other in swapped_labels(table)
    ]
    return [*swapped, *_miscalibrated(metrics), *_inferior(metrics[final], final)]


def swapped_labels(table: pandas.DataFrame) -> list[tuple[str, str]]:
    """Find pairs of classes each of which is taken for the other more often than for itself."""
    counts = table.value_counts(["actual", "predicted"]).to_dict()
    return [
        (one, other)
        for one, other in combinations(sorted(set(table["actual"])), 2)
        if counts.get((one, other), 0) > counts.get((one, one), 0)
        and counts.get((other, one), 0) > counts.get((other, other), 0)
    ]


def draw_reliability(before: pandas.DataFrame, after: pandas.DataFrame | None) -> Figure:
    """Draw how often the model is right against how sure it is, as it answers and at the fitted temperature.

    Args:
        before: columns confidence, accuracy and count, a row per bin.
        after: the same at the temperature; None where none was fitted.
    """
    figure = new_figure(4.6, 3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    curves = [("as it answers", ACCENT, "o", -1, before)]
    if after is not None:
        curves.append(("at the fitted temperature", SECOND, "^", 1, after))
    for label, colour, marker, side, table in curves:
        low, high = _wilson(table)
        upper.vlines(table["confidence"], low, high, color=colour, linewidth=1, alpha=0.6)
        upper.plot(table["confidence"], table["accuracy"], marker, color=colour, markersize=5, label=label)
        lower.bar(table["confidence"] + side * _BAR / 2, table["count"], width=_BAR, color=colour)
    upper.set_ylabel("share right")
    upper.set_ylim(-0.06, 1.06)
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.set_ylabel("texts")
    lower.set_xlabel("confidence of the prediction")
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    least = min(float(table["confidence"].min()) for *_, table in curves)
    lower.set_xlim(0.1 * int(10 * min(0.5, least)), 1.02)
    for axes in (upper, lower):
        axes.grid(color=GRID)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_maps(maps: Mapping[str, pandas.DataFrame]) -> Figure:
    """Draw the test texts of each model in the plane; colour and shape tell the label, a cross a wrong answer.

    Args:
        maps: columns x, y, label and prediction, by title of the model.
    """
    labels = sorted({label for table in maps.values() for label in table["label"]})
    looks = [(colour, marker) for marker in _MARKERS for colour in _COLOURS]
    figure = new_figure(4.6 * len(maps), 4.2)
    for axes, (title, table) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        for place, label in enumerate(labels):
            colour, marker = looks[place % len(looks)]
            own = table[table["label"] == label]
            axes.plot(own["x"], own["y"], marker, color=colour, markersize=3, linewidth=0, alpha=0.75)
        _cross_out(axes, table[table["label"] != table["prediction"]])
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        bare(axes)
    handles = [axes.plot([], [], "x", color=INK, markersize=5, linewidth=0, label="wrong answer")[0]]
    if len(labels) <= len(looks):
        for label, (colour, marker) in zip(labels, looks, strict=False):
            name = label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 1]}…"
            handles += axes.plot([], [], marker, color=colour, markersize=5, linewidth=0, label=name)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    return figure


def _wilson(table: pandas.DataFrame) -> tuple[list[float], list[float]]:
    """Ends of the 95 % interval of each bin's share right (Wilson 1927)."""
    ends = [
        binomtest(round(share * count), int(count)).proportion_ci(0.95, method="wilson")
        for share, count in zip(table["accuracy"], table["count"], strict=True)
    ]
    return [end.low for end in ends], [end.high for end in ends]


def _cross_out(axes: Axes, wrong: pandas.DataFrame) -> None:
    axes.plot(wrong["x"], wrong["y"], "x", color=INK, markersize=5, markeredgewidth=0.9, linewidth=0)


def _miscalibrated(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A far temperature is a fault where it also helps on the test texts, which it was not fitted on."""
    found = []
    for name, values in metrics.items():
        scaling = values.get("temperature_scaling")
        if scaling is None or 1 / FAR_TEMPERATURE <= scaling["temperature"] <= FAR_TEMPERATURE:
            continue
        before, after = scaling["before"], scaling["after"]
        if after["log_loss"] < before["log_loss"]:
            too = "far too sure" if scaling["temperature"] > 1 else "far less sure than it could be"
            found.append(
                f"The {TITLES[name]} model is miscalibrated, {too} of its answers: a temperature of "
                f"{scaling['temperature']:.1f} takes its log loss from {before['log_loss']:.2f} to "
                f"{after['log_loss']:.2f} and its calibration error from {before['calibration_error']:.1%} to "
                f"{after['calibration_error']:.1%}."
            )
    return found


def _inferior(metrics: Mapping[str, Any], final: str) -> list[str]:
    against = metrics["against_reference"]
    if against["non_inferior"]:
        return []
    floor = f"the floor of {100 * against['floor']:.1f} points"
    lead = f"That the {TITLES[final]} model stays within {floor} is not shown on {metrics['texts']:,} texts"
    if not against["within_floor"]:
        return [f"The {TITLES[final]} model falls below {floor}, {points(against['difference'])} points."]
    more = against["texts_to_show"]
    enough = "" if more is None else f"; about {more:,} would show it of a model as good as the fine-tuned one"
    return [f"{lead} (p = {_p_value(against['non_inferiority_p'])}){enough}."]


def _summary(metrics: Mapping[str, Any], final: str) -> str:
    against = metrics["against_reference"]
    shown = f", no worse than the floor of {100 * against['floor']:.1f}" if against["non_inferior"] else ""
    return (
        f"The {TITLES[final]} model has {metrics['quality'][against['metric']]:.1%} "
        f"{against['metric'].replace('_', ' ')}, {points(against['difference'])} points against the fine-tuned one "
        f"({against['confidence']:.0%} interval {points(against['low'])} to {points(against['high'])}){shown}; "
        f"{metrics['texts']:,} texts could have shown a difference of {100 * against['detectable_difference']:.1f}."
    )


def _comparisons(metrics: Mapping[str, Mapping[str, Any]], role: str, final: str) -> list[Comparison]:
    """Hold every variant but the first against the reference or its parent; the first is the reference, exported."""
    against = {name: values[f"against_{role}"] for name, values in metrics.items() if name in PARENTS}
    if not against:
        return []
    level = 1 - next(iter(against.values()))["confidence"]
    mcnemar = compare_variants({name: found["mcnemar_p"] for name, found in against.items()}, level)
    inferior = compare_variants({name: found["non_inferiority_p"] for name, found in against.items()}, level / 2)
    claim = final if role == "reference" else None
    shown = {
        name: found["non_inferior"] if name == claim else inferior[name].significant for name, found in against.items()
    }
    return [
        Comparison(
            title=TITLES[name],
            other=TITLES[PARENTS[name] if role == "parent" else CHAIN[0]],
            against=found,
            mcnemar=mcnemar[name],
            verdict=_verdict(found, shown[name]),
            good=shown[name],
        )
        for name, found in against.items()
    ]


def _verdict(against: Mapping[str, Any], shown: bool) -> str:
    if shown:
        return "no worse than the floor"
    return "within the floor, not shown" if against["within_floor"] else "below the floor"


def _per_class(first: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "before": first["per_class"].get(name, {}).get("f1"), **scores}
        for name, scores in final["per_class"].items()
    ]


def _examples(flips: pandas.DataFrame) -> list[dict[str, Any]]:
    """A few texts of each kind of flip, in the order of the test set."""
    rows = pandas.concat([flips[flips["kind"] == kind].head(EXAMPLES_OF_A_KIND) for kind in KINDS])
    return [
        {str(name): value for name, value in row.items()} for row in rows.replace({"kind": KINDS}).to_dict("records")
    ]


def _reliability(folder: Path) -> tuple[pandas.DataFrame, pandas.DataFrame | None]:
    before, after = folder / "calibration.csv", folder / "calibration_scaled.csv"
    columns = ("confidence", "accuracy", "count")
    return read_numbers(before, *columns), read_numbers(after, *columns) if after.exists() else None


def _places(folder: Path) -> pandas.DataFrame:
    return tables.read_table(folder / "embeddings.parquet", "parquet", "utf-8")


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"

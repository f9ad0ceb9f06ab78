"""Where compression hurt: parts of the test texts judged apart, the worst first, and gaps between groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.core.artifacts import read_json
from stages.core.ladder import CHAIN, TITLES, VARIANTS, fastest_within_floor, ladder_rows, points
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.report.drawing import ACCENT, BAD, INK, MUTED, bare, new_figure, style
from stages.report.sections import Section
from stages.report.sources import read_mixed

_DRAWN = 10
_NUMBERS = ("accuracy", "reference_accuracy", "difference", "low", "high", "p", "p_holm")
_GAPS = {
    "accuracy": "accuracy",
    "demographic_parity": "demographic parity",
    "equalized_odds": "equalized odds",
}


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Tell the slices of the final model, and in short those of all others; None where `evaluate` judged none."""
    folders = {name: inputs[f"evaluate@{name}"] for name in VARIANTS if f"evaluate@{name}" in inputs}
    evaluations = {name: read_json(folder / METRICS) for name, folder in folders.items()}
    known = {name: metrics for name, metrics in evaluations.items() if "slices" in metrics}
    if not known:
        return None
    final = next(name for name in (*reversed(CHAIN), *VARIANTS) if name in known)
    best = fastest_within_floor(ladder_rows(evaluations))
    trusted = {final, *([best.name] if best else [])}
    hurt = [name for name in known if name in trusted and known[name]["slices"]["hurt"]]
    table = read_slices(folders[final] / "slices.csv")
    judged = table[table["judged"]]
    figures = {}
    if len(judged):
        with style("draw"):
            figures["slices_worst"] = draw_worst(judged.head(_DRAWN))
    return Section(
        identifier="slices",
        title="Where compression hurt",
        summary=" ".join(_verdict(name, known[name]["slices"]) for name in hurt or [final]),
        context={
            "final": final,
            "rows": table.to_dict("records"),
            "totals": {name: metrics["slices"] for name, metrics in known.items()},
            "gaps": _gap_rows(known[final]["fairness"]),
            "confidence": params.evaluate.confidence,
            "smallest": params.evaluate.slices.smallest,
        },
        figures=figures,
        descriptions={
            "slices_worst": "Share of right answers of the final model less that of the fine-tuned one, with "
            "intervals, for the slices that lost most; the figures are in the table"
        },
        alarm=bool(hurt),
    )


def read_slices(path: Path) -> pandas.DataFrame:
    """Read slices.csv; a slice called NA or 01 stays what it is. Adds `title`, what people call the slice."""
    table = read_mixed(
        path,
        dtype={"kind": str, "name": str, "value": str},
        keep_default_na=False,
        na_values={name: [""] for name in _NUMBERS},
    )
    rule = table["kind"] == "rule"
    table["title"] = table["name"].where(rule, table["name"] + ": " + table["value"])
    return table


def _verdict(name: str, found: Mapping[str, Any]) -> str:
    if not found["judged"]:
        return f"No slice holds enough texts to judge the {TITLES[name]} model by."
    worst = f"{found['worst']} ({points(found['worst_difference'])} points)"
    if found["hurt"]:
        more = "" if found["hurt"] == 1 else f" and {found['hurt'] - 1} more"
        return (
            f"The {TITLES[name]} model got worse on {worst}{more}, by more than chance explains; "
            f"{found['judged']} slices were judged."
        )
    return (
        f"On none of the {found['judged']} slices judged did the {TITLES[name]} model lose more than chance explains; "
        f"the worst is {worst}."
    )


def _gap_rows(fairness: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"grouping": grouping, "groups": found["groups"], "gap": title, **found[name]}
        for grouping, found in fairness.items()
        for name, title in _GAPS.items()
        if name in found
    ]


def draw_worst(table: pandas.DataFrame) -> Figure:
    """Draw the difference to the fine-tuned model with its interval, a row per slice, in percentage points."""
    figure = new_figure(9.4, 0.3 * len(table) + 0.8)
    axes = figure.subplots()
    axes.axvline(0, color=MUTED, linewidth=0.9)
    for height, row in enumerate(table.to_dict("records")):
        colour = BAD if row["hurt"] else ACCENT
        axes.hlines(height, 100 * row["low"], 100 * row["high"], color=colour, linewidth=2)
        axes.plot(100 * row["difference"], height, "o", color=colour, markersize=7)
    bare(axes)
    axes.set_ylim(len(table) - 0.4, -0.6)
    titles = [f"{_short(title)} ({n:,})" for title, n in zip(table["title"], table["texts"], strict=True)]
    axes.set_yticks(range(len(table)), titles)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("points of accuracy against the fine-tuned model")
    axes.grid(axis="x")
    return figure


def _short(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"

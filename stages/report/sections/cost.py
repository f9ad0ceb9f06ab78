"""What every model costs to run: latency in full, throughput by batch and length, memory, cold start, price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from stages.core.artifacts import read_json
from stages.core.ladder import CHAIN, TITLES, VARIANTS
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.report.drawing import ACCENT, BAD, GOOD, INK, MUTED, SECOND, bare, new_figure, style
from stages.report.sections import Section
from stages.report.sources import read_mixed

BATCH_CURVE, LENGTH_CURVE = "throughput_batch.csv", "throughput_length.csv"
_COLOURS = dict(zip(VARIANTS, (MUTED, SECOND, GOOD, ACCENT, BAD, INK), strict=True))


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Tell the cost of every variant; None where `evaluate` measured none."""
    folders = {name: inputs[f"evaluate@{name}"] for name in VARIANTS if f"evaluate@{name}" in inputs}
    evaluations = {name: read_json(folder / METRICS) for name, folder in folders.items()}
    known = [name for name, metrics in evaluations.items() if "cost" in metrics]
    if not known:
        return None
    rows = [_row(name, evaluations[name]) for name in known]
    latencies = {name: _quantiles(folders[name], evaluations[name]) for name in known}
    shares = {name: share for name in known if (share := evaluations[name]["cost"]["ceilings"]["share"]) is not None}
    final = next(name for name in (*reversed(CHAIN), *VARIANTS) if name in known)
    with style("draw"):
        figures = {
            "cost_latency": draw_latency(latencies),
            "cost_batch": draw_curves(_curves(folders, known, BATCH_CURVE), "size", "texts in a batch"),
            "cost_length": draw_curves(_curves(folders, known, LENGTH_CURVE), "tokens", "tokens per text"),
        }
        if shares:
            figures["cost_ceiling"] = draw_shares(shares)
    return Section(
        identifier="cost",
        title="What it costs to run",
        summary=_summary(final, evaluations[final]),
        context={
            "rows": rows,
            "ceilings": evaluations[final]["cost"]["ceilings"],
            "priced": params.evaluate.cost.price_per_hour,
            "energy_told": any(row["energy"] is not None for row in rows),
            "starts": params.evaluate.cost.cold_starts,
        },
        figures=figures,
        descriptions={
            "cost_latency": "Milliseconds of one text at a time over the share of the texts that took at most so long, "
            "a line per model on its soonest runtime",
            "cost_batch": "Texts per second over batch size, a line per model on its fastest runtime",
            "cost_length": "Texts per second over the length of the texts in tokens, a line per model",
            "cost_ceiling": "Share of the machine's measured ceiling of matrix products that each model uses",
        },
    )


def _row(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    cost, best = metrics["cost"], metrics["best"]
    return {
        "variant": name,
        "runtime": best["throughput_runtime"],
        "texts_per_second": best["texts_per_second"],
        "cold_start": cost["cold_start"],
        "peak": best["peak_memory_mb"],
        "resident": best["resident_memory_mb"],
        "bytes": metrics["size"]["model_bytes"],
        "parameters": metrics["size"]["parameters"],
        "operations": cost["operations"],
        "share": cost["ceilings"]["share"],
        "energy": cost["energy_joules_per_thousand_texts"],
        "price": cost.get("price_per_million_texts"),
    }


def _summary(final: str, metrics: Mapping[str, Any]) -> str:
    row = _row(final, metrics)
    told = (
        f"The {TITLES[final]} model answers its first text {row['cold_start']['seconds']:.1f} s after its process "
        f"starts and then holds {row['resident']:,.0f} MiB"
    )
    if row["share"] is None:
        return f"{told}."
    return f"{told}; it uses {row['share']:.0%} of what this machine multiplies at most."


def _quantiles(folder: Path, metrics: Mapping[str, Any]) -> pandas.DataFrame:
    """Latency of the runtime that answers soonest."""
    table = read_mixed(folder / "latency.csv")
    own: pandas.DataFrame = table[table["contender"] == metrics["best"]["latency_runtime"]]
    return own


def draw_latency(latencies: Mapping[str, pandas.DataFrame]) -> Figure:
    """Draw the share of the texts over the milliseconds that they took at most.

    Args:
        latencies: columns share and milliseconds, by variant.
    """
    figure = new_figure(4.0, 3.1)
    axes = figure.subplots()
    for name, table in latencies.items():
        axes.plot(table["milliseconds"], table["share"], color=_COLOURS[name], linewidth=1.6, label=TITLES[name])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("milliseconds per text (log scale)")
    axes.set_ylabel("texts answered")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _curves(folders: Mapping[str, Path], names: Sequence[str], file: str) -> dict[str, pandas.DataFrame]:
    return {name: read_mixed(folders[name] / file) for name in names}


def draw_curves(curves: Mapping[str, pandas.DataFrame], across: str, label: str) -> Figure:
    """Draw texts per second over batch size or length, with the least and the most of the rounds as a band.

    Args:
        curves: columns size, tokens, texts_per_second, low and high, by variant.
        across: column of the horizontal axis.
        label: of the horizontal axis.
    """
    figure = new_figure(4.0, 3.1)
    axes = figure.subplots()
    for name, points in curves.items():
        colour = _COLOURS[name]
        axes.fill_between(points[across], points["low"], points["high"], color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            points[across], points["texts_per_second"], "o-", color=colour, linewidth=1.6, markersize=4,
            label=TITLES[name],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] in "25" else ""))
    axes.set_xlabel(f"{label} (log scale)")
    axes.set_ylabel("texts per second (log scale)")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_shares(shares: Mapping[str, float]) -> Figure:
    """Draw how much of the measured ceiling every variant uses; what is left of the bar is headroom."""
    figure = new_figure(4.0, 0.33 * len(shares) + 0.9)
    axes = figure.subplots()
    places = range(len(shares))
    axes.barh(places, list(shares.values()), color=ACCENT, height=0.55)
    for place, share in zip(places, shares.values(), strict=True):
        axes.annotate(f"{share:.0%}", (share, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(1.0, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
    bare(axes)
    axes.set_yticks(places, [TITLES[name] for name in shares])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.1, *shares.values()) * 1.05)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("of the ceiling of the arithmetic it runs in")
    axes.grid(axis="x")
    return figure

"""Fills the page: findings and pictures in, one HTML file out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from stages.core.ladder import (
    TITLES,
    LadderRow,
    fastest_within_floor,
    headline,
    points,
    rate,
    times,
    times_smaller,
)
from stages.core.observe.tracking import flatten
from stages.core.params import Params
from stages.report import plots
from stages.report.devices import read_devices
from stages.report.drawing import inline, settle, style
from stages.report.sources import EXAMPLES, TRAINED, Findings

_STAGE_TITLES = {**TITLES, "pretrain": "pretraining", "finetune": "fine-tuning", "distill": "distillation"}
_STAGE_TITLES["prune"] = "recovery after pruning"
_UNKNOWN = "–"


def draw(findings: Findings, params: Params) -> dict[str, Figure]:
    """Draw every picture of the report, by the name of its file."""
    floor = params.quality.floor
    with style("draw"):
        figures = {
            "ladder": plots.ladder(findings.rows, floor),
            "ladder_narrow": plots.ladder(findings.rows, floor, narrow=True),
            "confusion": plots.confusion(findings.confusion),
            "calibration": plots.calibration(findings.calibration),
            "lengths": plots.lengths(findings.lengths),
            "latency": plots.latency(_latencies(findings), TITLES),
            "throughput": plots.throughput(_throughputs(findings)),
            "cascade": plots.trade_off(
                findings.trade_off, findings.metrics["cascade"]["chosen"], params.cascade.tolerated_loss
            ),
        }
        for stage, history in findings.histories.items():
            column, label = ("heldout_loss", "held out") if stage == "pretrain" else ("validation_loss", "validation")
            figures[f"curves_{stage}"] = plots.curves(history, column, label)
        for figure in figures.values():
            settle(figure)
    return figures


def render(findings: Findings, params: Params, figures: Mapping[str, Figure]) -> str:
    """Fill the template.

    Args:
        findings: what the stages found.
        params: of the whole pipeline.
        figures: from `draw`.
    """
    best = fastest_within_floor(findings.rows)
    page = _environment().get_template("page.html")
    return page.render(
        findings=findings,
        params=params,
        settings=flatten(params.model_dump(mode="json", exclude={"tracking"})),
        hardware=flatten(findings.machine),
        best=best,
        tiles=_tiles(findings, best),
        headline=headline(findings.rows),
        answer=_answer(best, findings.rows),
        final=findings.evaluations[findings.final],
        final_title=TITLES[findings.final],
        pictures={name: Markup(inline(figures[name], name, text)) for name, text in _descriptions(findings).items()},
        training=[_training(findings, stage) for stage in TRAINED if stage in findings.metrics],
        cascade=findings.metrics["cascade"],
        passed_on=findings.evaluations.get("cascade", {}).get("passed_on"),
        attempts=_attempts(findings),
        sparsity=_sparsity(findings),
        devices=read_devices(findings.deploy_check, params.deploy_check),
        provenance=flatten(findings.provenance),
        splits=_splits(findings),
        rule_splits=list(dict.fromkeys(findings.rules["split"])),
        rules=_rules(findings.rules),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: f"{share:.1%}",
        points=points,
        times=times,
        number=_number,
        mib=lambda size: _UNKNOWN if size is None else f"{size / 2**20:,.1f}",
        millions=lambda count: _UNKNOWN if count is None else f"{count / 1e6:,.1f}",
        rate=rate,
        whole=lambda value: _UNKNOWN if value is None else f"{value:,.0f}",
        stage=lambda name: _STAGE_TITLES.get(name, name),
        title=lambda name: TITLES.get(name, name),
    )
    return environment


def _answer(best: LadderRow | None, rows: Sequence[LadderRow]) -> str:
    """The answer in as few words as will do; `headline` has the rest."""
    if best is None:
        return "No model meets the quality floor"
    size = times_smaller(best, rows)
    smaller = f" and {times(size)} smaller" if size > 1.0 else ""
    faster = f"{times(best.over_fair.median)} as fast{smaller}"
    if best.difference is None or best.difference >= -0.0005:
        return f"{faster}, at no loss of {best.metric.replace('_', ' ')}"
    return f"{faster}, for {-100 * best.difference:.1f} points of {best.metric.replace('_', ' ')}"


def _tiles(findings: Findings, best: LadderRow | None) -> list[tuple[str, str]]:
    """The answer in four figures, each with what it means."""
    if best is None:
        return []
    tiles = [
        (times(best.over_fair.median), "the throughput of fair PyTorch"),
        (times(best.over_naive.median), "the throughput of naive PyTorch"),
    ]
    if best.difference is not None and best.low is not None and best.high is not None:
        what = f"points of {best.metric.replace('_', ' ')}, {points(best.low)} to {points(best.high)}"
        tiles.append((points(best.difference), what))
    return [*tiles, (times(times_smaller(best, findings.rows)), "smaller on disk")]


def _latencies(findings: Findings) -> dict[str, dict[str, dict[str, float]]]:
    return {
        variant: {name: runtime["latency_ms"] for name, runtime in evaluation["runtimes"].items()}
        for variant, evaluation in findings.evaluations.items()
    }


def _throughputs(findings: Findings) -> dict[str, dict[str, float]]:
    """Texts per second by title of the variant and batch size, on the runtime that was fastest for it."""
    return {
        TITLES[variant]: evaluation["runtimes"][evaluation["best"]["throughput_runtime"]]["texts_per_second"]
        for variant, evaluation in findings.evaluations.items()
    }


def _rules(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """A row per cleaning rule that found something: counts by split, and the first example."""
    found = []
    for name, rows in table[table["count"] > 0].groupby("rule", sort=False):
        before, after = (rows[column].iloc[0] for column in EXAMPLES)
        counts = dict(zip(rows["split"], rows["count"], strict=True))
        found.append({"rule": name, "counts": counts, "before": before, "after": after})
    return found


def _splits(findings: Findings) -> list[dict[str, Any]]:
    """Texts, and median and largest length in tokens, of every split."""
    found = []
    for name, table in findings.lengths.groupby("split", sort=False):
        ordered = table.sort_values("length")
        half = ordered["count"].sum() / 2
        median = ordered["length"][ordered["count"].cumsum() >= half].iloc[0]
        found.append(
            {"name": name, "texts": ordered["count"].sum(), "median": median, "longest": ordered["length"].max()}
        )
    return found


def _attempts(findings: Findings) -> list[tuple[str, str]]:
    """Recipes of quantization in the order tried, each with why it failed; empty for the one taken."""
    if "quantize" not in findings.metrics:
        return []
    metrics = findings.metrics["quantize"]
    in_order = sorted(metrics["attempts"].items(), key=lambda item: int(item[1]["place"]))
    tried = [(name, str(attempt["reason"])) for name, attempt in in_order]
    return tried if metrics["recipe"] in metrics["attempts"] else [*tried, (metrics["recipe"], "")]


def _training(findings: Findings, stage: str) -> dict[str, Any]:
    """A stage's curves, and the best value of each that has one."""
    history = findings.histories.get(stage)
    if history is None:
        return {"stage": stage, "picture": None, "note": "Trained nothing: handed its model on."}
    if "validation_accuracy" in history and history["validation_accuracy"].notna().any():
        note = f"Best validation accuracy {history['validation_accuracy'].max():.1%}"
    elif "heldout_loss" in history and history["heldout_loss"].notna().any():
        losses = history["heldout_loss"].dropna()
        note = f"Held-out loss {losses.iloc[0]:.3f} to {losses.iloc[-1]:.3f}"
    else:
        note = f"Training loss {history['train_loss'].dropna().iloc[-1]:.3f}"
    return {"stage": stage, "picture": f"curves_{stage}", "note": f"{note}, {history['step'].max():,.0f} steps."}


def _sparsity(findings: Findings) -> str | None:
    """What zeros in full-sized layers bring, where pruning left some; None elsewhere."""
    sparse = findings.metrics.get("prune", {}).get("sparse")
    if sparse is None:
        return None
    return f"{sparse['overall']:.0%} of the encoder's weights are zero ({sparse['method']}): {sparse['speed']}."


def _descriptions(findings: Findings) -> dict[str, str]:
    """What each picture shows, in words, for readers who do not see it."""
    ladder = "; ".join(
        f"{row.title} {rate(row.texts_per_second)} texts a second, {row.metric.replace('_', ' ')} {row.quality:.1%}"
        for row in findings.rows
    )
    right = int(findings.confusion.to_numpy().diagonal().sum())
    texts = int(findings.confusion.to_numpy().sum())
    longest = findings.lengths["length"].max()
    descriptions = {
        "ladder": f"Throughput and quality of every model: {ladder}",
        "ladder_narrow": f"Throughput and quality of every model: {ladder}",
        "confusion": f"Confusion matrix: {right} of {texts} texts on the diagonal; the scores are in the table",
        "calibration": "Share of right predictions against confidence, with a diagonal for perfect calibration",
        "lengths": f"Histogram of tokens per text, up to {longest}",
        "latency": "Latency at batch 1 from p50 to p99 for every model and runtime; the figures are in the table",
        "cascade": "What the cascade loses against its larger model, over the share of the texts that it passes on",
        "throughput": "Texts per second against batch size for every model on its fastest runtime",
    }
    for stage in findings.histories:
        descriptions[f"curves_{stage}"] = f"Training and held-out loss over the steps of {_STAGE_TITLES[stage]}"
    return descriptions


def _number(value: Any) -> str:
    """Write any plain value for people: thousands separated, four digits where there are decimals."""
    if value is None or value == "":
        return _UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)

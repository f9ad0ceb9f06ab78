"""What a run came to: the table of its stages and the performance ladder, for people, Prefect and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from flows.graph import Stage
from stages.core.artifacts import ARTIFACTS, read_json
from stages.core.ladder import VARIANTS, LadderRow, headline, ladder_rows, points, times

StageStatus = Literal["ran", "cached", "refused", "failed", "interrupted", "skipped"]
RunStatus = Literal["done", "refused", "failed", "interrupted"]

_KEY_METRICS = ("verdict", "alias", "quality.{metric}", "validation.{metric}", "after.perplexity", "after.heldout_loss")


@dataclass
class StageResult:
    """What became of one stage in one run."""

    stage: str
    status: StageStatus
    seconds: float
    metric: str
    """The figure to look at first, such as `accuracy 0.964`; empty where there is none."""
    message: str


@dataclass
class RunSummary:
    """What became of one run."""

    execution: str
    status: RunStatus
    seconds: float
    stages: list[StageResult]
    ladder: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_ladder() -> list[LadderRow]:
    """Read the ladder of the variants that were evaluated; empty where none was.

    Raises:
        UserError: if an evaluation lacks a value.
    """
    found = {name: ARTIFACTS / "evaluate" / name / "metrics.json" for name in VARIANTS}
    metrics = {name: read_json(path) for name, path in found.items() if path.exists()}
    return ladder_rows(metrics) if metrics else []


def key_metric(stage: Stage, metric: str) -> str:
    """Return the figure of a stage's `metrics.json` to look at first.

    Args:
        stage: whose output is read.
        metric: the quality that counts, such as accuracy.
    """
    path = stage.folder / "metrics.json"
    if not path.exists():
        return ""
    metrics = read_json(path)
    for pattern in _KEY_METRICS:
        name = pattern.format(metric=metric)
        value = _value_at(metrics, name)
        if value is not None:
            return f"{name.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{value}"
    return ""


def print_summary(summary: RunSummary, console: Console) -> None:
    """Print the table of the stages."""
    table = Table(title=f"Run {summary.execution}: {summary.status} in {summary.seconds:.0f} s", title_justify="left")
    for heading, side in (("stage", "left"), ("", "left"), ("seconds", "right"), ("key figure", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for result in summary.stages:
        color = {"ran": "green", "cached": "cyan", "skipped": "dim"}.get(result.status, "red")
        seconds = f"{result.seconds:.1f}" if result.status not in ("cached", "skipped") else ""
        table.add_row(result.stage, f"[{color}]{result.status}[/]", seconds, result.metric)
    console.print(table)


def print_ladder(rows: Sequence[LadderRow], console: Console) -> None:
    """Print the performance ladder and what it came to."""
    if not rows:
        console.print("No model was evaluated yet, so there is no ladder.")
        return
    table = Table(title="Performance ladder", title_justify="left")
    for number, heading in enumerate(ladder_table(rows)[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in ladder_table(rows):
        table.add_row(*row.values())
    console.print(table)
    console.print(headline(rows), highlight=False)


def ladder_table(rows: Sequence[LadderRow]) -> list[dict[str, str]]:
    """Return the ladder as text: one mapping of heading to cell for each row."""
    return [_ladder_cells(row) for row in rows]


def stage_cells(summary: RunSummary) -> list[dict[str, Any]]:
    """Return the table of the stages for Prefect."""
    return [asdict(result) for result in summary.stages]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Render rows with the same headings as a Markdown table."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report_page() -> Path:
    """Where the report lies."""
    return ARTIFACTS / "report" / "report.html"


def _ladder_cells(row: LadderRow) -> dict[str, str]:
    interval = "" if row.low is None or row.high is None else f" ({points(row.low)} to {points(row.high)})"
    size = "" if row.model_bytes is None else f"{row.model_bytes / 2**20:.1f}"
    return {
        "model": row.name,
        row.metric.replace("_", " "): f"{row.quality:.4f}{interval}",
        "within floor": "yes" if row.within_floor else "no",
        "p50 ms": f"{row.latency_p50_ms:.2f}",
        "texts/s": f"{row.texts_per_second:,.0f}",
        "MiB": size,
        "over fair": times(row.over_fair.median),
        "over naive": times(row.over_naive.median),
        "runtime": row.throughput_runtime,
    }


def _value_at(metrics: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(metrics, Mapping) or part not in metrics:
            return None
        metrics = metrics[part]
    return metrics if isinstance(metrics, int | float | str) else None

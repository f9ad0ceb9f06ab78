"""What a run would do and take, from the graph and from what each stage measured last time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from flows.graph import Forecast, Outlook, Stage, forecast
from stages.core.artifacts import ARTIFACTS, read_json
from stages.core.stage import MEASURED

_RUNS: tuple[Outlook, ...] = ("run", "probably")
_WORDS = {
    "cached": "cached",
    "restore": "back from the cache",
    "run": "will run",
    "probably": "will run (probably)",
    "always": "runs every time",
}


@dataclass(frozen=True)
class Step:
    """What a run would do with one stage."""

    stage: str
    outlook: Outlook
    reasons: tuple[str, ...]
    seconds: float | None
    """Wall time of its last run; None where unknown."""
    memory_mb: float | None
    """Peak memory of its last run."""
    disk_mb: float | None
    """Its last output, once in the workspace and once in DVC's cache."""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    steps: tuple[Step, ...]
    free_disk_mb: float
    free_memory_mb: float

    @property
    def running(self) -> list[Step]:
        """The stages that would run."""
        return [step for step in self.steps if step.outlook in _RUNS]

    @property
    def unknown(self) -> list[str]:
        """Stages that would run and never ran here, so that nothing is known of what they take."""
        return [step.stage for step in self.running if step.seconds is None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        known = [step for step in self.running if step.seconds is not None]
        return {
            "stages": [asdict(step) for step in self.steps],
            "will_run": len(self.running),
            "estimate": {
                "seconds": sum(step.seconds or 0.0 for step in known),
                "peak_memory_mb": max((step.memory_mb or 0.0 for step in known), default=0.0),
                "disk_mb": sum(step.disk_mb or 0.0 for step in known),
                "unknown": self.unknown,
            },
            "free": {"disk_mb": self.free_disk_mb, "memory_mb": self.free_memory_mb},
        }


def make_plan(target: str | None = None) -> Plan:
    """Look at the graph and at the machine.

    Raises:
        UserError: if the graph cannot be read or there is no such stage.
    """
    graph, forecasts = forecast(target)
    steps = tuple(_step(stage, forecasts[stage.name]) for stage in graph.up_to(target))
    free_disk = shutil.disk_usage(ARTIFACTS if ARTIFACTS.exists() else ".").free
    return Plan(steps, round(free_disk / 2**20), round(psutil.virtual_memory().available / 2**20))


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table with the sums below it."""
    table = Table()
    for heading in ("stage", "what", "why"):
        table.add_column(heading)
    for heading in ("time", "memory", "disk"):
        table.add_column(heading, justify="right")
    for step in plan.steps:
        costs = _costs(step) if step.outlook in _RUNS else ("", "", "")
        color = {"cached": "cyan", "restore": "cyan", "always": "dim"}.get(step.outlook, "green")
        why = "" if step.outlook == "always" else "; ".join(step.reasons)
        table.add_row(step.stage, f"[{color}]{_WORDS[step.outlook]}[/]", why, *costs)
    console.print(table)
    for line in _sums(plan):
        console.print(line, highlight=False)


def _sums(plan: Plan) -> Sequence[str]:
    free = f"Free here: {_bytes(plan.free_disk_mb)} on the disk, {_bytes(plan.free_memory_mb)} of memory."
    if not plan.running:
        return ["Nothing changed; a run would take seconds.", free]
    estimate = plan.to_dict()["estimate"]
    sums = (
        f"about {_time(estimate['seconds'])}, {_bytes(estimate['peak_memory_mb'])} of memory at most, "
        f"{_bytes(estimate['disk_mb'])} of disk"
    )
    if not plan.unknown:
        return [f"{len(plan.running)} stages to run: {sums}.", free]
    if len(plan.unknown) == len(plan.running):
        return [f"{len(plan.running)} stages to run; what they take is unknown, none ran here before.", free]
    return [f"{len(plan.running)} stages to run: {sums}, and unknown: {', '.join(plan.unknown)}.", free]


def _step(stage: Stage, found: Forecast) -> Step:
    path = stage.folder / MEASURED
    measured = read_json(path) if path.exists() else {}
    disk = None if stage.size is None else round(2 * stage.size / 2**20, 1)
    return Step(
        stage.name, found.outlook, found.reasons, measured.get("wall_seconds"), measured.get("peak_memory_mb"), disk
    )


def _costs(step: Step) -> tuple[str, str, str]:
    return (
        "unknown" if step.seconds is None else _time(step.seconds),
        "unknown" if step.memory_mb is None else _bytes(step.memory_mb),
        "unknown" if step.disk_mb is None else _bytes(step.disk_mb),
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _bytes(megabytes: float) -> str:
    return f"{megabytes:.0f} MiB" if megabytes < 2048 else f"{megabytes / 1024:.1f} GiB"

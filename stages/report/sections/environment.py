"""The machine that was measured, what every stage spent on it, and every setting."""

from __future__ import annotations

from dataclasses import dataclass

from stages.core.artifacts import read_json
from stages.core.observe.tracking import flatten
from stages.core.params import Params
from stages.core.stage import MEASURED
from stages.report.sections import Section
from stages.report.sources import Inputs


@dataclass(frozen=True)
class Cost:
    """What a stage spent."""

    stage: str
    wall_seconds: float
    peak_memory_mb: float
    energy_joules: float | None


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the machine, the costs and the settings."""
    costs = [_cost(role, inputs) for role in inputs]
    machine = flatten(read_json(inputs["deploy_check"] / "details.json")["inventory"])
    seconds = sum(cost.wall_seconds for cost in costs)
    largest = max(cost.peak_memory_mb for cost in costs)
    return Section(
        identifier="environment",
        title="Machine, cost and settings",
        summary=f"All stages together took {seconds / 60:,.1f} minutes and at most {largest:,.0f} MiB of memory.",
        context={
            "costs": costs,
            "hardware": machine,
            "settings": flatten(params.model_dump(mode="json", exclude={"tracking"})),
        },
    )


def _cost(role: str, inputs: Inputs) -> Cost:
    measured = read_json(inputs[role] / MEASURED)
    return Cost(role, measured["wall_seconds"], measured["peak_memory_mb"], measured["energy_joules"])

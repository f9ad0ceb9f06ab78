"""The deployment check as rows of a table: what a device measured, beside what it must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.params import DeployCheckParams, Params
from stages.report.sections import Section
from stages.report.sources import Inputs, read_metrics


@dataclass(frozen=True)
class Row:
    """One target."""

    what: str
    measured: float | None
    target: float
    at_most: bool
    """Whether the target is the largest accepted value, or the smallest."""

    @property
    def held(self) -> bool | None:
        """Whether the target was met; None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.target if self.at_most else self.measured >= self.target


@dataclass(frozen=True)
class Device:
    """One device of the deployment check."""

    name: str
    status: str
    """passed, failed, absent or unusable."""
    required: bool
    runtime: str | None
    rows: list[Row]
    notes: list[str]
    """What failed or is missing, and how the soak run went."""


def section(inputs: Inputs, params: Params) -> Section | None:
    """Tell what every device measured; a check that failed is an alarm."""
    if "deploy_check" not in inputs:
        return None
    found = read_metrics(inputs, "deploy_check")
    devices = read_devices(found, params.deploy_check)
    told = ", ".join(f"{device.name} {device.status}" for device in devices)
    return Section(
        identifier="deployment",
        title="Deployment check",
        summary=f"{found['verdict'].capitalize()}: {told}.",
        context={"verdict": found["verdict"], "gpu": found["gpu"], "devices": devices},
        alarm=found["verdict"] != "passed",
    )


def read_devices(metrics: Mapping[str, Any], params: DeployCheckParams) -> list[Device]:
    """Turn the metrics of `deploy_check` into a table per device; devices that were not checked have no rows."""
    return [_device(name, device, params) for name, device in metrics["devices"].items()]


def _device(name: str, device: Mapping[str, Any], params: DeployCheckParams) -> Device:
    measured, notes = device.get("measured"), list(device["failures"])
    rows: list[Row] = []
    if measured is not None and "error" not in measured:
        rows = _rows(name, measured, device["targets"], params)
        soak = device["soak"]
        if soak is not None and "error" not in soak:
            rows.append(Row("soak requests that failed, share", soak["error_rate"], params.soak_error_rate, True))
            notes.append(
                f"Soak run: {soak['requests']:,} requests in {soak['seconds']:g} s, {soak['errors']:,} failed."
            )
    return Device(name, device["status"], device["required"], device.get("runtime"), rows, notes)


def _rows(name: str, measured: Mapping[str, Any], targets: Mapping[str, float], params: DeployCheckParams) -> list[Row]:
    memory = measured["memory_mb" if name == "cpu" else "gpu_memory_mb"]
    return [
        Row("latency p95 at batch 1, ms", measured["latency_ms"]["p95"], targets["latency_p95_ms"], True),
        Row("texts per second", measured["best_texts_per_second"], targets["throughput"], False),
        Row("peak memory, MiB", memory, targets["memory_mb"], True),
        Row("largest difference of a probability", measured["parity"], params.tolerance, True),
    ]

"""Measurements against targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.core.params import DeployCheckParams, TargetParams


def missed_targets(device: str, measured: Mapping[str, Any], target: TargetParams, tolerance: float) -> list[str]:
    """Compare one runtime's check with the targets of its device.

    Args:
        device: cpu or gpu.
        measured: `latency_ms`, `best_texts_per_second`, `memory_mb`, `gpu_memory_mb` and `parity`, the largest
            difference of a probability to the CPU reference; or `error`.
        target: to hold.
        tolerance: for parity.

    Returns:
        a line for each target that is missed.
    """
    if "error" in measured:
        return [f"{device}: does not run: {measured['error']}"]
    where = f"deploy_check.{device}"
    latency, speed = measured["latency_ms"]["p95"], measured["best_texts_per_second"]
    memory = memory_of(device, measured)
    missed = []
    if measured["parity"] > tolerance:
        missed.append(
            f"{device}: probabilities differ by {measured['parity']:.3g} from the CPU reference, "
            f"deploy_check.tolerance is {tolerance:g}"
        )
    if latency > target.latency_p95_ms:
        missed.append(f"{device}: latency p95 is {latency:.2f} ms, {where}.latency_p95_ms is {target.latency_p95_ms:g}")
    if speed < target.throughput:
        missed.append(f"{device}: {speed:.0f} texts a second, {where}.throughput is {target.throughput:g}")
    if memory is None:
        missed.append(f"{device}: the driver does not tell its memory, so {where}.memory_mb cannot be checked")
    elif memory > target.memory_mb:
        missed.append(f"{device}: {memory:.0f} MiB of memory, {where}.memory_mb is {target.memory_mb:g}")
    return missed


def missed_in_soak(
    device: str, measured: Mapping[str, Any], target: TargetParams, params: DeployCheckParams
) -> list[str]:
    """Compare a soak run with its targets; a line for each that is missed."""
    if "error" in measured:
        return [f"{device}: broke down in the soak run: {measured['error']}"]
    missed = []
    if measured["error_rate"] > params.soak_error_rate:
        missed.append(
            f"{device}: {measured['errors']} of {measured['requests']} soak requests failed "
            f"({measured['messages'][0]}), deploy_check.soak_error_rate is {params.soak_error_rate:g}"
        )
    memory = memory_of(device, measured)
    if memory is not None and memory > target.memory_mb:
        missed.append(
            f"{device}: {memory:.0f} MiB of memory in the soak run, deploy_check.{device}.memory_mb is "
            f"{target.memory_mb:g}"
        )
    return missed


def memory_of(device: str, measured: Mapping[str, Any]) -> float | None:
    """Memory in MiB that counts on a device: the process's on a CPU, the card's on a GPU."""
    memory: float | None = measured["memory_mb" if device == "cpu" else "gpu_memory_mb"]
    return memory


def decide(devices: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Turn the devices' results into one verdict.

    Args:
        devices: with `status` (passed, failed, absent), `required` and `failures`.

    Returns:
        `passed` or `failed`, and the failures behind it. Failed is what misses a required device or target, and also
        a model that no device was found to serve.
    """
    failures = [line for device in devices.values() if device["required"] for line in device["failures"]]
    if failures:
        return "failed", failures
    if any(device["status"] == "passed" for device in devices.values()):
        return "passed", []
    return "failed", [line for device in devices.values() for line in device["failures"]]

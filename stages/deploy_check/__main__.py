"""`python -m stages.deploy_check`: the final model against the service's targets on every device that is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import pandas

from stages.core.artifacts import STATE, write_json
from stages.core.errors import UserError
from stages.core.fresh import FreshProcessError
from stages.core.observe.progress import track
from stages.core.params import TargetParams
from stages.core.runtimes import REFERENCE_RUNTIME
from stages.core.stage import StageRun, command
from stages.deploy_check.inventory import CPU_CONTENDERS, gpu_contenders, take_inventory
from stages.deploy_check.service import Service, check, soak_run
from stages.deploy_check.verdict import decide, missed_in_soak, missed_targets

VERDICT = STATE / "deploy_check-verdict.json"
"""Where a verdict that fails the stage can be read."""
DETAILS = "details.json"
"""Beside the metrics: the inventory, and what every runtime measured."""

_TORCH_REFERENCE = "torch-eager-fp32"


@dataclass
class Checker:
    """Checks devices, and computes each CPU reference once."""

    run: StageRun
    texts: Sequence[str]
    parity_texts: Sequence[str]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What every runtime measured, by device."""
    _references: dict[str, Any] = field(default_factory=dict)

    def device(self, name: str, contenders: Sequence[str], target: TargetParams) -> dict[str, Any]:
        """Check every contender of a device and soak the best."""
        params = self.run.params.deploy_check
        measured = {contender: self._check(contender) for contender in track(contenders, f"checking {name}")}
        missed = {
            contender: missed_targets(name, result, target, params.tolerance) for contender, result in measured.items()
        }
        best = min(contenders, key=lambda one: (len(missed[one]), -measured[one].get("best_texts_per_second", 0.0)))
        failures = missed[best]
        soaked = None
        if "error" not in measured[best]:
            self.run.say(f"soaking {best} for {params.soak_seconds:.0f} s")
            soaked = self._soak(best, params.soak_seconds)
            failures = [*failures, *missed_in_soak(name, soaked, target, params)]
        self.contenders[name] = measured
        return {
            "status": "failed" if failures else "passed",
            "required": target.required,
            "runtime": best,
            "targets": target.model_dump(exclude={"required"}),
            "measured": measured[best],
            "soak": soaked,
            "failures": failures,
        }

    def _check(self, contender: str) -> dict[str, Any]:
        """Measure a contender; one that does not run is told as such and the others go on."""
        try:
            result = self._reference_result() if contender == REFERENCE_RUNTIME else self._measure(contender)
            reference = self._reference(contender)
        except FreshProcessError as error:
            return {"error": str(error)}
        probabilities = numpy.asarray(result["probabilities"])
        if not numpy.isfinite(probabilities).all():
            return {"error": "it answers with probabilities that are not finite"}
        parity = float(numpy.abs(probabilities - reference).max())
        return {**{name: value for name, value in result.items() if name != "probabilities"}, "parity": parity}

    def _reference_result(self) -> dict[str, Any]:
        if REFERENCE_RUNTIME not in self._references:
            self._references[REFERENCE_RUNTIME] = self._measure(REFERENCE_RUNTIME)
        result: dict[str, Any] = self._references[REFERENCE_RUNTIME]
        return result

    def _reference(self, contender: str) -> numpy.ndarray:
        """Probabilities on the CPU of the same weights: of the ONNX file, or of the float checkpoint."""
        if not contender.startswith("torch-"):
            return numpy.asarray(self._reference_result()["probabilities"])
        if _TORCH_REFERENCE not in self._references:
            self._references[_TORCH_REFERENCE] = self._measure(_TORCH_REFERENCE, device="cpu")
        return numpy.asarray(self._references[_TORCH_REFERENCE]["probabilities"])

    def _measure(self, contender: str, device: str = "cuda") -> dict[str, Any]:
        return check(self._service(contender, device), self.texts, self.parity_texts)

    def _soak(self, contender: str, seconds: float) -> dict[str, Any]:
        try:
            return soak_run(self._service(contender, "cuda"), self.texts, seconds)
        except FreshProcessError as error:
            return {"error": str(error)}

    def _service(self, contender: str, device: str) -> Service:
        model, checkpoint = (str(self.run.inputs[role]) for role in ("model", "checkpoint"))
        return Service(contender, model, checkpoint, self.run.params.seed, device)


def run_deploy_check(run: StageRun) -> dict[str, Any]:
    """Check every device; return the metrics.

    Raises:
        UserError: if a device that params call required is absent or misses a target; a line for each.
    """
    params = run.params.deploy_check
    inventory = take_inventory()
    texts = pandas.read_parquet(run.inputs["data"] / "test.parquet", columns=["text"])["text"].tolist()
    random.Random(run.params.seed).shuffle(texts)
    checker = Checker(run, texts, texts[: params.parity_texts])
    devices = {"cpu": checker.device("cpu", CPU_CONTENDERS, params.cpu)}
    if inventory["gpu"] == "absent":
        devices["gpu"] = _not_checked("absent", params.gpu, "gpu: absent, no NVIDIA driver or card was found")
    elif contenders := gpu_contenders():
        devices["gpu"] = checker.device("gpu", contenders, params.gpu)
    else:
        reason = "gpu: a card is there but no installed package can use it; `make gpu` installs ones that can"
        devices["gpu"] = _not_checked("unusable", params.gpu, reason)
    verdict, failures = decide(devices)
    metrics = {"verdict": verdict, "gpu": inventory["gpu"], "devices": devices, "failures": failures}
    details = {"inventory": inventory, "contenders": checker.contenders}
    write_json(run.staging / DETAILS, details)
    _tell(run, metrics, details)
    return metrics


def _not_checked(status: str, target: TargetParams, reason: str) -> dict[str, Any]:
    return {"status": status, "required": target.required, "failures": [reason]}


def _tell(run: StageRun, metrics: dict[str, Any], details: dict[str, Any]) -> None:
    """Say how each device did; keep a verdict that fails the stage where it can be read."""
    for name, device in metrics["devices"].items():
        run.say(f"{name}: {device['status']}{' on ' + device['runtime'] if 'runtime' in device else ''}")
        if not device["required"]:
            for line in device["failures"]:
                run.say(f"not required: {line}")
    required = [line for device in metrics["devices"].values() if device["required"] for line in device["failures"]]
    if required:
        write_json(VERDICT, {**metrics, **details})
        raise UserError("\n".join([*required, f"required by params.yaml; all measurements are in {VERDICT}"]))
    VERDICT.unlink(missing_ok=True)


if __name__ == "__main__":
    command("deploy_check", run_deploy_check, inputs=("model", "checkpoint", "data"))

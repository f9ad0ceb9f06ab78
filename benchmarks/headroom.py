"""Headroom's side: serves one exported model as `headroom predict` would, without PyTorch.

`python -m benchmarks.headroom REQUEST` is the serving process, the counterpart of `benchmarks.peers.serve`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.serve import serve
from benchmarks.peers.service import Classifier
from stages.core.artifacts import read_json
from stages.core.runtimes import REFERENCE_RUNTIME, ExportedModel, Goal, available_runtimes, open_runtime, predict


@dataclass(frozen=True)
class Choice:
    """Which runtime answers single texts, and which one answers many."""

    latency: str
    throughput: str


class HeadroomClassifier:
    """An exported model on a runtime."""

    def __init__(self, model: ExportedModel, runtime: str, threads: int | None, goal: Goal):
        self._model = model
        self._runtime = open_runtime(runtime, model, threads, goal)

    def classify(self, texts: Sequence[str], batch_size: int) -> list[int]:
        """Predict the label of every text, in order."""
        labels, _ = predict(self._model, self._runtime, texts, batch_size)
        result: list[int] = labels.tolist()
        return result


def chosen(artifacts: Path, variant: str) -> Choice:
    """What the evaluate stage found fastest for `export/<variant>`; ONNX Runtime where it was not measured."""
    metrics = artifacts / "evaluate" / Path(variant).name / "metrics.json"
    if not metrics.exists():
        return Choice(REFERENCE_RUNTIME, REFERENCE_RUNTIME)
    best = read_json(metrics)["best"]
    names = (best["latency_runtime"], best["throughput_runtime"])
    latency, throughput = (name if name in available_runtimes() else REFERENCE_RUNTIME for name in names)
    return Choice(latency, throughput)


def _open(request: dict[str, Any]) -> Callable[[str], Classifier]:
    model = ExportedModel.load(Path(request["model"]))

    def open_classifier(goal: str) -> Classifier:
        wanted: Goal = "latency" if goal == "latency" else "throughput"
        return HeadroomClassifier(model, request["runtimes"][wanted], request["threads"], wanted)

    return open_classifier


if __name__ == "__main__":
    serve(_open(json.loads(sys.argv[1])))

"""Headroom's side: serves one exported model, or a cascade, as `headroom predict` would, without PyTorch.

`python -m benchmarks.headroom REQUEST` is the serving process, the counterpart of `benchmarks.peers.serve`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.serve import serve
from benchmarks.peers.service import Classifier
from stages.core.cascade import Exported, load_exported, predict_exported
from stages.core.choice import DEFAULT, RUNTIME_FILE, Setting, open_setting, read_choice
from stages.core.runtimes import Goal


class HeadroomClassifier:
    """An exported model as a setting runs it."""

    def __init__(self, model: Exported, setting: Setting, goal: Goal):
        self._model = model
        self._runtime = open_setting(setting, model, goal)
        self._mean_tokens = 0.0

    def classify(self, texts: Sequence[str], batch_size: int) -> list[int]:
        """Predict the label of every text, in order; a batch holds as many tokens as `batch_size` texts on average."""
        if not self._mean_tokens:
            self._mean_tokens = statistics.fmean(len(row) for row in self._model.encode(texts))
        budget = round(batch_size * self._mean_tokens)
        labels, _ = predict_exported(self._model, self._runtime, texts, batch_tokens=budget)
        result: list[int] = labels.tolist()
        return result


def chosen(artifacts: Path, variant: str) -> dict[str, dict[str, Any]]:
    """What the evaluate stage found fastest here, by goal, as fields of `Setting`; the default if not measured."""
    path = artifacts / "evaluate" / Path(variant).name / RUNTIME_FILE
    goals: tuple[Goal, ...] = ("latency", "throughput")
    return {goal: asdict(read_choice(path, goal)[0] if path.exists() else DEFAULT) for goal in goals}


def _open(request: dict[str, Any]) -> Callable[[str], Classifier]:
    model = load_exported(Path(request["model"]))

    def open_classifier(goal: str) -> Classifier:
        wanted: Goal = "latency" if goal == "latency" else "throughput"
        return HeadroomClassifier(model, Setting(**request["settings"][wanted]), wanted)

    return open_classifier


if __name__ == "__main__":
    serve(_open(json.loads(sys.argv[1])))

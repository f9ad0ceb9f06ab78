"""Command line of the cascade stage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas

from stages.cascade.cost import multiplied_weights
from stages.cascade.threshold import Answers, Point, choose, trade_off
from stages.core.artifacts import digest, write_json
from stages.core.cascade import CASCADE_FILE, LARGE, NONE_PASSED_ON, SMALL, require_same_labels
from stages.core.examples import load_examples
from stages.core.metrics import Array, score
from stages.core.runtimes import REFERENCE_RUNTIME, ExportedModel, open_runtime, predict
from stages.core.stage import StageRun, command

CURVE = "trade_off.csv"

_BATCH_SIZE = 32
_METRICS = ("accuracy", "f1_macro", "f1_weighted")


def run_cascade(run: StageRun) -> dict[str, Any]:
    """Choose the threshold, put both models into one unit, write the trade-off; return the metrics."""
    params = run.params.cascade
    models = {role: ExportedModel.load(run.inputs[role]) for role in (SMALL, LARGE)}
    require_same_labels(models[SMALL], models[LARGE])
    validation = load_examples(run.inputs["data"], "validation")
    small, large = (_probabilities(models[role], validation.texts) for role in (SMALL, LARGE))
    answers = Answers(small, large, validation.labels)
    weights = {role: multiplied_weights(model.onnx_path) for role, model in models.items()}

    small_cost = weights[SMALL] / weights[LARGE]
    points = trade_off(answers, run.params.quality.metric, small_cost, params, run.params.seed)
    chosen = choose(points) if params.enabled else points[0]
    _tell(run, chosen)
    _write_unit(run, models, chosen)
    _write_curve(run.staging / CURVE, points, chosen)
    return {
        "parameters": sum(model.parameters for model in models.values()),
        "model_bytes": sum(model.model_bytes for model in models.values()),
        "weights_per_token": weights,
        "chosen": asdict(chosen),
        "validation": _scores(answers.together(chosen.threshold), validation.labels),
        SMALL: _scores(answers.small.argmax(axis=1), validation.labels),
        LARGE: _scores(answers.large.argmax(axis=1), validation.labels),
    }


def _probabilities(model: ExportedModel, texts: Sequence[str]) -> Array:
    return predict(model, open_runtime(REFERENCE_RUNTIME, model), texts, _BATCH_SIZE)[1]


def _scores(predictions: Array, labels: Array) -> dict[str, float]:
    return {metric: score(metric, predictions, labels) for metric in _METRICS}


def _tell(run: StageRun, chosen: Point) -> None:
    if chosen.threshold == NONE_PASSED_ON:
        who = "the small model answers everything"
    elif chosen.passed_on == 1.0:
        who = "the larger model answers everything"
    else:
        who = f"the small model answers what it is more than {chosen.threshold:.1%} sure of"
    run.say(
        f"{who}; {chosen.passed_on:.1%} passed on, {run.params.quality.metric} {chosen.quality:.4f}, "
        f"{chosen.difference:+.4f} against the larger model ({chosen.low:+.4f} to {chosen.high:+.4f})"
    )


def _write_unit(run: StageRun, models: dict[str, ExportedModel], chosen: Point) -> None:
    folder = run.unit("model")
    for role, model in models.items():
        shutil.copytree(model.folder, folder / role)
    description = {
        "confidence": "largest probability",
        "threshold": chosen.threshold,
        "chosen_on": {
            "split": "validation",
            "metric": run.params.quality.metric,
            **{name: value for name, value in asdict(chosen).items() if name not in ("threshold", "admissible")},
        },
        "parents": {role: digest(model.folder) for role, model in models.items()},
    }
    write_json(folder / CASCADE_FILE, description)


def _write_curve(path: Path, points: Sequence[Point], chosen: Point) -> None:
    rows = [{**asdict(point), "chosen": point == chosen} for point in points]
    pandas.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")


if __name__ == "__main__":
    command("cascade", run_cascade, inputs=(SMALL, LARGE, "data"))

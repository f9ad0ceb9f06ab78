"""How good the predictions are, alone and beside the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from stages.core.metrics import Array, calibration_table, classification_metrics, paired_bootstrap
from stages.core.params import EvaluateParams, QualityParams


def score_quality(probabilities: Array, labels: Array, names: Sequence[str], params: EvaluateParams) -> dict[str, Any]:
    """Score probabilities [texts, labels] as `quality` and `per_class`."""
    return classification_metrics(probabilities, labels, names, params.calibration_bins)


def compare(
    variant: Array, reference: Array, labels: Array, quality: QualityParams, params: EvaluateParams, seed: int
) -> dict[str, Any]:
    """Difference of the variant's score to the reference's on the same texts.

    Args:
        variant: predicted classes, [texts].
        reference: predicted classes of the fine-tuned model, [texts].
        labels: true classes, [texts].
        quality: metric and floor.
        params: samples and confidence of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `difference` with `low` and `high`; `within_floor` tells whether the difference is within the quality floor,
        `surely_within_floor` whether the whole interval is.
    """
    difference, low, high = paired_bootstrap(
        quality.metric, variant, reference, labels, params.bootstrap_samples, params.confidence, seed
    )
    return {
        "metric": quality.metric,
        "difference": difference,
        "low": low,
        "high": high,
        "confidence": params.confidence,
        "floor": quality.floor,
        "within_floor": bool(difference >= -quality.floor),
        "surely_within_floor": bool(low >= -quality.floor),
        "agreement": float((variant == reference).mean()),
    }


def write_tables(
    folder: Path, texts: Sequence[str], labels: Array, probabilities: Array, names: Sequence[str], bins: int
) -> None:
    """Write predictions.parquet, confusion.csv (a row a text, as `dvc plots` reads it) and calibration.csv."""
    predicted = probabilities.argmax(axis=1)
    actual_names = [names[index] for index in labels]
    predicted_names = [names[index] for index in predicted]
    pandas.DataFrame(
        {
            "text": list(texts),
            "label": actual_names,
            "prediction": predicted_names,
            "score": probabilities.max(axis=1).astype("float64"),
        }
    ).to_parquet(folder / "predictions.parquet", index=False)
    confusion = pandas.DataFrame({"actual": actual_names, "predicted": predicted_names})
    confusion.to_csv(folder / "confusion.csv", index=False, lineterminator="\n")
    calibration = pandas.DataFrame(
        calibration_table(probabilities, labels, bins), columns=["confidence", "accuracy", "count"]
    )
    calibration.to_csv(folder / "calibration.csv", index=False, lineterminator="\n")

"""How good the predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

from stages.core.metrics import Array, calibration_table, classification_metrics
from stages.evaluate.calibration import calibration_scores

RELIABILITY = "calibration.csv"
RELIABILITY_SCALED = "calibration_scaled.csv"


def score_quality(probabilities: Array, labels: Array, names: Sequence[str], bins: int) -> dict[str, Any]:
    """Score predicted probabilities.

    Args:
        probabilities: [texts, classes].
        labels: class indices, [texts].
        names: of the classes.
        bins: of the calibration errors.

    Returns:
        `quality` and `per_class`. The area under the ROC curve is one class against the rest, and on average over the
        classes (Fawcett 2006, "An introduction to ROC analysis"), or that of the second class where there are two;
        None where no class has both texts of its own and others.
    """
    from sklearn.metrics import matthews_corrcoef, precision_recall_fscore_support

    scored = classification_metrics(probabilities, labels, names, bins)
    predictions = probabilities.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=range(len(names)), average="micro", zero_division=0.0
    )
    areas = _areas(probabilities, labels)
    found = [area for area in areas if area is not None]
    quality = {
        **scored["quality"],
        "precision_micro": float(precision),
        "recall_micro": float(recall),
        "f1_micro": float(f1),
        "matthews": float(matthews_corrcoef(labels, predictions)),
        "roc_auc": (found[-1] if len(names) == 2 else float(numpy.mean(found))) if found else None,
        **calibration_scores(probabilities, labels, bins),
    }
    per_class = {
        name: {**scores, "roc_auc": area}
        for (name, scores), area in zip(scored["per_class"].items(), areas, strict=True)
    }
    return {"quality": quality, "per_class": per_class}


def prediction_table(
    texts: Sequence[str], labels: Array, probabilities: Array, names: Sequence[str]
) -> pandas.DataFrame:
    """Columns text, label, prediction and score (the largest probability), a row a text."""
    return pandas.DataFrame(
        {
            "text": list(texts),
            "label": [names[index] for index in labels],
            "prediction": [names[index] for index in probabilities.argmax(axis=1)],
            "score": probabilities.max(axis=1).astype("float64"),
        }
    )


def write_tables(folder: Path, predictions: pandas.DataFrame) -> None:
    """Write predictions.parquet and confusion.csv, a row a text, as `dvc plots` reads it."""
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    confusion = predictions[["label", "prediction"]].set_axis(["actual", "predicted"], axis=1)
    confusion.to_csv(folder / "confusion.csv", index=False, lineterminator="\n")


def write_reliability(path: Path, probabilities: Array, labels: Array, bins: int) -> None:
    """Write the reliability curve: columns confidence, accuracy and count, a row per bin that is not empty."""
    rows = calibration_table(probabilities, labels, bins)
    table = pandas.DataFrame(rows, columns=["confidence", "accuracy", "count"])
    table.to_csv(path, index=False, lineterminator="\n")


def _areas(probabilities: Array, labels: Array) -> list[float | None]:
    """Area under the ROC curve of each class against the rest."""
    from sklearn.metrics import roc_auc_score

    return [
        float(roc_auc_score(labels == index, probabilities[:, index])) if 0 < own < len(labels) else None
        for index, own in enumerate(numpy.bincount(labels, minlength=probabilities.shape[1]))
    ]

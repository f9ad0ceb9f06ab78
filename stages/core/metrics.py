"""Quality of predictions, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

Array = numpy.ndarray
_SMALLEST_PROBABILITY = 1e-12


def softmax(logits: Array) -> Array:
    """Turn logits [n, classes] into probabilities."""
    shifted = numpy.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def classification_metrics(
    probabilities: Array, labels: Array, names: Sequence[str], calibration_bins: int
) -> dict[str, Any]:
    """Score predicted probabilities.

    Args:
        probabilities: [n, classes].
        labels: class indices, [n].
        names: of the classes.
        calibration_bins: for the calibration error.

    Returns:
        `quality`: accuracy, precision, recall and F1 (macro and weighted), calibration error, log loss;
        `per_class`: precision, recall, F1 and support by name.
    """
    from sklearn.metrics import precision_recall_fscore_support  # slow to import; serving needs softmax alone

    predictions = probabilities.argmax(axis=1)
    quality: dict[str, float] = {"accuracy": float((predictions == labels).mean())}
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predictions, labels=range(len(names)), average=average, zero_division=0.0
        )
        quality |= {f"precision_{average}": float(precision), f"recall_{average}": float(recall)}
        quality[f"f1_{average}"] = float(f1)
    quality["calibration_error"] = calibration_error(probabilities, labels, calibration_bins)
    quality["log_loss"] = log_loss(probabilities, labels)
    return {"quality": quality, "per_class": _per_class(predictions, labels, names)}


def score(metric: str, predictions: Array, labels: Array) -> float:
    """Score predicted classes by one metric: accuracy, f1_macro or f1_weighted."""
    if metric == "accuracy":
        return float((predictions == labels).mean())
    classes = int(max(predictions.max(), labels.max())) + 1
    return float(_f1(metric, _confusion_counts(predictions[None], labels[None], classes))[0])


def log_loss(probabilities: Array, labels: Array) -> float:
    """Mean negative log probability of the true class, in nats."""
    chosen = probabilities[numpy.arange(len(labels)), labels]
    return float(-numpy.log(numpy.maximum(chosen, _SMALLEST_PROBABILITY)).mean())


def calibration_table(probabilities: Array, labels: Array, bins: int) -> list[dict[str, float]]:
    """Mean confidence against accuracy in bins of equal width of the confidence; empty bins are left out."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    place = numpy.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[place == index].mean()),
            "accuracy": float(correct[place == index].mean()),
            "count": int((place == index).sum()),
        }
        for index in range(bins)
        if (place == index).any()
    ]


def calibration_error(probabilities: Array, labels: Array, bins: int) -> float:
    """Expected calibration error (Guo et al., 1706.04599): mean gap of confidence and accuracy, weighted by count."""
    table = calibration_table(probabilities, labels, bins)
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return float(gaps / len(labels))


def paired_bootstrap(
    metric: str, first: Array, second: Array, labels: Array, samples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Difference of two models' scores on the same texts, first minus second, with a percentile interval.

    Texts are drawn again with replacement, both models keep their answers (Koehn 2004, EMNLP).

    Args:
        metric: accuracy, f1_macro or f1_weighted.
        first: predicted classes, [n].
        second: predicted classes of the other model, [n].
        labels: true classes, [n].
        samples: of the bootstrap.
        confidence: of the interval, such as 0.95.
        seed: of the draw.

    Returns:
        difference, low, high.
    """
    generator = numpy.random.default_rng(seed)
    draws = generator.integers(0, len(labels), size=(samples, len(labels)))
    differences = _scores(metric, first[draws], labels[draws]) - _scores(metric, second[draws], labels[draws])
    low, high = numpy.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    difference = score(metric, first, labels) - score(metric, second, labels)
    return float(difference), float(low), float(high)


def _scores(metric: str, predictions: Array, labels: Array) -> Array:
    """Score many samples at once, [samples, n] -> [samples]."""
    if metric == "accuracy":
        accuracy: Array = (predictions == labels).mean(axis=1)
        return accuracy
    classes = int(max(predictions.max(), labels.max())) + 1
    return _f1(metric, _confusion_counts(predictions, labels, classes))


def _confusion_counts(predictions: Array, labels: Array, classes: int) -> Array:
    """Confusion matrices [samples, actual, predicted] of [samples, n] predictions."""
    cells = labels * classes + predictions
    counts = [numpy.bincount(row, minlength=classes * classes) for row in cells]
    return numpy.stack(counts).reshape(-1, classes, classes)


def score_counts(metric: str, right: Array, actual: Array, predicted: Array) -> Array:
    """Score many samples from counts by class.

    Args:
        metric: accuracy, f1_macro or f1_weighted.
        right: texts of each class that were predicted as such, [samples, classes].
        actual: texts of each class, [samples, classes].
        predicted: texts predicted as each class, [samples, classes].

    Returns:
        [samples].
    """
    if metric == "accuracy":
        accuracy: Array = right.sum(axis=1) / actual.sum(axis=1)
        return accuracy
    f1 = 2 * right / numpy.maximum(actual + predicted, 1)
    weights = (actual + predicted) > 0 if metric == "f1_macro" else actual
    result: Array = (f1 * weights).sum(axis=1) / weights.sum(axis=1)
    return result


def _f1(metric: str, confusion: Array) -> Array:
    right = numpy.diagonal(confusion, axis1=1, axis2=2)
    return score_counts(metric, right, confusion.sum(axis=2), confusion.sum(axis=1))


def _per_class(predictions: Array, labels: Array, names: Sequence[str]) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels, predictions, labels=range(len(names)), average=None, zero_division=0.0
    )
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, *columns, strict=True)
    }

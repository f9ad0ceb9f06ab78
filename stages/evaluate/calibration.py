"""Whether the model is right as often as it says, and what one temperature would mend."""

from __future__ import annotations

from typing import Any

import numpy
from scipy.optimize import minimize_scalar

from stages.core.metrics import Array, calibration_error, log_loss, softmax

_TEMPERATURES = (0.02, 50.0)
_SMALLEST_PROBABILITY = float(numpy.finfo(numpy.float32).tiny)


def calibration_scores(probabilities: Array, labels: Array, bins: int) -> dict[str, float]:
    """Score probabilities [n, classes] as the report compares them before and after a temperature."""
    return {
        "calibration_error": calibration_error(probabilities, labels, bins),
        "calibration_error_adaptive": adaptive_calibration_error(probabilities, labels, bins),
        "brier": brier_score(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
    }


def adaptive_calibration_error(probabilities: Array, labels: Array, bins: int) -> float:
    """Calibration error over bins of equally many texts (Nguyen & O'Connor 2015, 1508.05154), so that a model which
    is nearly always sure is judged where its texts are. With fewer texts than bins, each text is a bin.
    """
    order = numpy.argsort(probabilities.max(axis=1), kind="stable")
    gap = (probabilities.max(axis=1) - (probabilities.argmax(axis=1) == labels))[order]
    parts = numpy.array_split(gap, min(bins, len(labels)))
    return float(sum(abs(part.sum()) for part in parts) / len(labels))


def brier_score(probabilities: Array, labels: Array) -> float:
    """Squared distance of the probabilities from the truth (Brier 1950): 0 at best, 2 for a certain mistake."""
    truth = numpy.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def at_temperature(probabilities: Array, temperature: float) -> Array:
    """Soften (above 1) or sharpen (below 1) probabilities [n, classes]; the answers stay the same.

    Probabilities are as good as logits here: their logarithms differ from these by a constant a text. What was rounded
    to 0 counts as the smallest number of single precision.
    """
    logits = numpy.log(numpy.maximum(probabilities.astype(numpy.float64), _SMALLEST_PROBABILITY))
    return softmax(logits / temperature)


def fit_temperature(probabilities: Array, labels: Array) -> float:
    """Find the temperature of least log loss (Guo et al. 2017, 1706.04599), between 0.02 and 50.

    Args:
        probabilities: of texts that are not those to be judged, [n, classes].
        labels: class indices, [n].
    """
    found = minimize_scalar(
        lambda logarithm: log_loss(at_temperature(probabilities, float(numpy.exp(logarithm))), labels),
        bounds=tuple(numpy.log(_TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(numpy.exp(found.x))


def scaling_scores(probabilities: Array, labels: Array, temperature: float, bins: int) -> dict[str, Any]:
    """Tell what a temperature changes on the texts that are judged: nothing that is served is scaled by it."""
    return {
        "temperature": temperature,
        "before": calibration_scores(probabilities, labels, bins),
        "after": calibration_scores(at_temperature(probabilities, temperature), labels, bins),
    }

"""Which answers the small model may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from stages.core.cascade import ALL_PASSED_ON, NONE_PASSED_ON, confidence_of, passed_on
from stages.core.metrics import Array, paired_bootstrap, score
from stages.core.params import CascadeParams

_MOST_BETWEEN = 99  # a hundred steps are as fine as any validation split can tell apart
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Answers:
    """What both models say to the same texts."""

    small: Array
    """Probabilities, [texts, labels]."""
    large: Array
    """The same of the larger model."""
    labels: Array
    """True classes, [texts]."""

    def together(self, threshold: float) -> Array:
        """Predicted classes of the cascade, [texts]."""
        unsure = passed_on(self.small, threshold)
        predictions: Array = numpy.where(unsure, self.large.argmax(axis=1), self.small.argmax(axis=1))
        return predictions


@dataclass(frozen=True)
class Point:
    """What a cascade comes to at one threshold."""

    threshold: float
    passed_on: float
    """Share of the texts that the larger model answers."""
    quality: float
    difference: float
    """Quality minus that of the larger model alone."""
    low: float
    """Lower end of the paired bootstrap interval of `difference`."""
    high: float
    cost: float
    """Of a text, over that of the larger model alone; an estimate."""
    admissible: bool
    """Whether this threshold and every one above it keep within the tolerated loss."""


def candidate_thresholds(confidence: Array) -> list[float]:
    """Thresholds worth trying, ascending: 0, some halfway between neighbours in confidence, and 1.

    Args:
        confidence: of the small model, [texts].
    """
    values = numpy.unique(confidence)
    between = (values[:-1] + values[1:]) / 2
    if len(between) > _MOST_BETWEEN:
        between = between[numpy.linspace(0, len(between) - 1, _MOST_BETWEEN).round().astype(int)]
    return [NONE_PASSED_ON, *between.tolist(), ALL_PASSED_ON]


def trade_off(answers: Answers, metric: str, small_cost: float, params: CascadeParams, seed: int) -> list[Point]:
    """Judge a cascade at every candidate threshold.

    Args:
        answers: of both models to the validation texts.
        metric: accuracy, f1_macro or f1_weighted.
        small_cost: of the small model's answer over that of the larger one's.
        params: tolerated loss and bootstrap.
        seed: of the bootstrap, the same for every threshold.

    Returns:
        a point per threshold, ascending; the last one passes everything on and is always admissible.
    """
    points: list[Point] = []
    admissible = True
    for threshold in reversed(candidate_thresholds(confidence_of(answers.small))):
        point = _judge(answers, threshold, metric, small_cost, params, seed)
        admissible = admissible and point.low >= -params.tolerated_loss - _ROUNDING
        points.append(Point(**{**vars(point), "admissible": admissible}))
    return points[::-1]


def choose(points: Sequence[Point]) -> Point:
    """Return the cheapest admissible point."""
    return min((point for point in points if point.admissible), key=lambda point: point.cost)


def _judge(
    answers: Answers, threshold: float, metric: str, small_cost: float, params: CascadeParams, seed: int
) -> Point:
    predictions = answers.together(threshold)
    difference, low, high = paired_bootstrap(
        metric,
        predictions,
        answers.large.argmax(axis=1),
        answers.labels,
        params.bootstrap_samples,
        params.confidence,
        seed,
    )
    share = float(passed_on(answers.small, threshold).mean())
    return Point(
        threshold=threshold,
        passed_on=share,
        quality=score(metric, predictions, answers.labels),
        difference=difference,
        low=low,
        high=high,
        # The small model need not be asked where it is never believed.
        cost=1.0 if threshold >= ALL_PASSED_ON else small_cost + share,
        admissible=False,
    )

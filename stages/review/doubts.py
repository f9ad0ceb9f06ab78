"""Which labels are probably wrong: confident learning (Northcutt et al., 1911.00068).

A class has its own threshold: how probable the model finds it, on average, for the texts that carry its label. A text
counts as confidently of a class if the class is at least as probable as that; where that class is not the label given,
the label is in doubt. Thresholds of their own make up for a model that is surer of one class than of another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from stages.core.metrics import Array

_NONE = -1


@dataclass(frozen=True)
class Doubt:
    """A label that is probably wrong."""

    index: int
    """Of the text."""
    suggestion: int
    """The class that it seems to be of."""
    likely: float
    """Probability of that class."""
    given: float
    """Probability of the label given."""

    @property
    def margin(self) -> float:
        """Probability of the suggestion less that of the label given: the larger, the more in doubt."""
        return self.likely - self.given


def label_doubts(probabilities: Array, labels: Array) -> list[Doubt]:
    """Find the labels in doubt, the worst first.

    Args:
        probabilities: [texts, classes], of a model that did not learn from the label of the text.
        labels: given classes, [texts].
    """
    worst: dict[int, Doubt] = {}
    for given, suggestion in zip(*numpy.nonzero(wrong := _wrong_labels(probabilities, labels)), strict=True):
        texts = numpy.flatnonzero(labels == given)
        margins = probabilities[texts, suggestion] - probabilities[texts, given]
        for index in texts[numpy.argsort(-margins, kind="stable")[: wrong[given, suggestion]]]:
            doubt = Doubt(int(index), int(suggestion), *map(float, probabilities[index, [suggestion, given]]))
            worst[doubt.index] = max(doubt, worst.get(doubt.index, doubt), key=lambda found: found.margin)
    return sorted(worst.values(), key=lambda doubt: (-doubt.margin, doubt.index))


def confident_classes(probabilities: Array, labels: Array) -> Array:
    """The class that each text confidently is of, int64 [texts]; -1 where no class reaches its threshold.

    Of several classes that do, the most probable counts (equation 2).
    """
    reached = numpy.where(probabilities >= _thresholds(probabilities, labels), probabilities, -numpy.inf)
    return numpy.where(numpy.isfinite(reached).any(axis=1), reached.argmax(axis=1), _NONE)


def confident_joint(probabilities: Array, labels: Array) -> Array:
    """Count texts by label given (rows) and class they confidently are of (columns), int64 [classes, classes]."""
    classes = probabilities.shape[1]
    confident = confident_classes(probabilities, labels)
    counted = confident != _NONE
    joint = numpy.zeros((classes, classes), dtype=numpy.int64)
    numpy.add.at(joint, (labels[counted], confident[counted]), 1)
    return joint


def noise_rate(probabilities: Array, labels: Array) -> float:
    """Estimate the share of wrong labels: the off-diagonal of the calibrated joint (equation 3)."""
    joint = _calibrated(probabilities, labels)
    return float(1.0 - joint.trace() / joint.sum())


def _wrong_labels(probabilities: Array, labels: Array) -> Array:
    """How many texts of each label (rows) seem to be of each other class (columns), int64 [classes, classes]."""
    wrong: Array = numpy.rint(_calibrated(probabilities, labels)).astype(numpy.int64)
    numpy.fill_diagonal(wrong, 0)
    return wrong


def _calibrated(probabilities: Array, labels: Array) -> Array:
    """The confident joint with every row scaled to the texts that carry the label, [classes, classes].

    Of a label that no text confidently carries or leaves nothing is known: it counts as right.
    """
    joint = confident_joint(probabilities, labels).astype(float)
    numpy.fill_diagonal(joint, numpy.where(joint.sum(axis=1) == 0.0, 1.0, joint.diagonal()))
    given = numpy.bincount(labels, minlength=len(joint))
    scaled: Array = joint * (given / joint.sum(axis=1))[:, None]
    return scaled


def _thresholds(probabilities: Array, labels: Array) -> Array:
    """Mean probability of each class over the texts that carry its label, [classes]; infinite where none does."""
    classes = probabilities.shape[1]
    counts = numpy.bincount(labels, minlength=classes)
    sums = numpy.bincount(labels, probabilities[numpy.arange(len(labels)), labels], minlength=classes)
    means: Array = numpy.divide(sums, counts, out=numpy.full(classes, numpy.inf), where=counts > 0)
    return means

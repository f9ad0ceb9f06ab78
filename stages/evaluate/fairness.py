"""Rates and gaps between groups of texts, of a variant and of the fine-tuned model.

The rates come from fairlearn (Weerts et al., 2303.16626): selection rate, true and false positive rate, accuracy. With
more than two labels each label is once the positive one, and the widest gap counts. Demographic parity asks that a
label be predicted as often in every group, equalized odds (Hardt et al., 1610.02413) that it be so among the texts that
truly have it, and among those that have not. A gap is the largest rate less the smallest, so noise alone opens one:
what a variant changed against the fine-tuned model, whose gap is as noisy, says more than the gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
from sklearn.metrics import accuracy_score

from stages.core.metrics import Array
from stages.evaluate.slices import Grouping

GAPS = ("accuracy", "demographic_parity", "equalized_odds")


@dataclass(frozen=True)
class Rates:
    """Of one model in each group; any number of resamples in front."""

    accuracy: Array
    """[..., groups]"""
    selection: Array
    """Share of the texts that get the label, [..., groups, classes]."""
    true_positive: Array
    """The same among texts that have the label."""
    false_positive: Array
    """The same among those that have another."""


@dataclass(frozen=True)
class Enough:
    """Which rates rest on enough texts to count."""

    groups: Array
    """[groups]"""
    positives: Array
    """Texts with the label, [groups, classes]."""
    negatives: Array
    """Texts with another, [groups, classes]."""


def measure_fairness(
    groupings: Sequence[Grouping],
    variant: Array,
    reference: Array,
    labels: Array,
    classes: int,
    smallest: int,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Measure the gaps between the groups of every grouping but that by label.

    Args:
        groupings: of `make_groupings`.
        variant: predicted classes, [texts].
        reference: predicted classes of the fine-tuned model, [texts].
        labels: true classes, [texts].
        classes: how many there are.
        smallest: rates over fewer texts are left out.
        samples: of the bootstrap over texts, in which both models keep their answers.
        confidence: of the percentile intervals.
        seed: of the bootstrap.

    Returns:
        by grouping: how many `groups` are large enough, and for each of `GAPS` its `value`, `low`, `high`, that of the
        `reference`, and the `change` from it with `change_low` and `change_high`. A gap that no two groups are large
        enough for is left out, and a grouping without any.
    """
    found: dict[str, Any] = {}
    for grouping in groupings:
        names, codes = numpy.unique(grouping.groups.astype(str), return_inverse=True)
        enough = _enough(codes, labels, len(names), classes, smallest)
        if grouping.kind == "label" or enough.groups.sum() < 2:
            continue
        points = [_gaps(rates_by_group(codes, each, labels, classes), enough) for each in (variant, reference)]
        draws = _resample(codes, variant, reference, labels, len(names), classes, samples, seed)
        spread = [_gaps(rates, enough) for rates in draws]
        gaps = {
            name: _told(name, points, spread, confidence) for name in GAPS if not math.isnan(float(points[0][name]))
        }
        title = grouping.name if grouping.kind == grouping.name else f"{grouping.kind} {grouping.name}"
        found[title] = {"groups": int(enough.groups.sum()), **gaps}
    return found


def rates_by_group(groups: Array, predictions: Array, labels: Array, classes: int) -> Rates:
    """Compute the rates of one model with fairlearn.

    Args:
        groups: number of each text's group, [texts].
        predictions: predicted classes, [texts].
        labels: true classes, [texts].
        classes: how many there are.
    """
    measures = {"selection": selection_rate, "true": true_positive_rate, "false": false_positive_rate}
    frame = partial(MetricFrame, sensitive_features=groups)
    accuracy = frame(metrics=accuracy_score, y_true=labels, y_pred=predictions).by_group.to_numpy(dtype=float)
    by_class = [
        frame(
            metrics=measures, y_true=(labels == label).astype(int), y_pred=(predictions == label).astype(int)
        ).by_group
        for label in range(classes)
    ]
    stacked = {name: numpy.stack([one[name].to_numpy(dtype=float) for one in by_class], axis=-1) for name in measures}
    return Rates(accuracy, stacked["selection"], stacked["true"], stacked["false"])


def _enough(groups: Array, labels: Array, count: int, classes: int, smallest: int) -> Enough:
    positives = numpy.zeros((count, classes))
    numpy.add.at(positives, (groups, labels), 1)
    sizes = positives.sum(axis=1)
    return Enough(sizes >= smallest, positives >= smallest, sizes[:, None] - positives >= smallest)


def _gaps(rates: Rates, enough: Enough) -> dict[str, Array]:
    """Gaps between the groups that are large enough; NaN where there are no two of them."""
    true_gap = _gap(rates.true_positive, enough.positives)
    false_gap = _gap(rates.false_positive, enough.negatives)
    return {
        "accuracy": _gap(rates.accuracy[..., None], enough.groups[:, None]),
        "demographic_parity": _gap(rates.selection, enough.groups[:, None]),
        "equalized_odds": numpy.fmax(true_gap, false_gap),
    }


def _gap(rates: Array, counted: Array) -> Array:
    """Widest gap over the classes, [...], of rates [..., groups, classes]."""
    spread = numpy.fmax.reduce(numpy.where(counted, rates, math.nan), axis=-2) - numpy.fmin.reduce(
        numpy.where(counted, rates, math.nan), axis=-2
    )
    widest: Array = numpy.fmax.reduce(numpy.where(counted.sum(axis=0) > 1, spread, math.nan), axis=-1)
    return widest


def _resample(
    groups: Array, variant: Array, reference: Array, labels: Array, count: int, classes: int, samples: int, seed: int
) -> list[Rates]:
    """Rates of both models in texts drawn again with replacement.

    Texts alike in group, label and both answers are drawn as one cell, by their number: the same draw, far cheaper.
    """
    cells, numbers = numpy.unique(numpy.stack([groups, labels, variant, reference]), axis=1, return_counts=True)
    drawn = numpy.random.default_rng(seed).multinomial(len(labels), numbers / len(labels), size=samples).astype(float)
    group, label = cells[0], cells[1]
    place = group * classes + label
    positives = _tally(drawn, place, count, classes)
    sizes = positives.sum(axis=2)
    result = []
    with numpy.errstate(divide="ignore", invalid="ignore"):
        for answer in cells[2:]:
            selected = _tally(drawn, group * classes + answer, count, classes)
            hits = _tally(drawn * (answer == label), place, count, classes)
            negatives = sizes[..., None] - positives
            accuracy = hits.sum(axis=2) / sizes
            rates = (selected / sizes[..., None], hits / positives, (selected - hits) / negatives)
            result.append(Rates(accuracy, *rates))
    return result


def _tally(drawn: Array, place: Array, count: int, classes: int) -> Array:
    """Add up cells [samples, cells] by place, to [samples, groups, classes]."""
    indicator = numpy.zeros((len(place), count * classes))
    indicator[numpy.arange(len(place)), place] = 1.0
    return (drawn @ indicator).reshape(-1, count, classes)


def _told(
    name: str, points: Sequence[Mapping[str, Array]], spread: Sequence[Mapping[str, Array]], confidence: float
) -> dict[str, float]:
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    value, reference = float(points[0][name]), float(points[1][name])
    low, high = numpy.nanquantile(spread[0][name], ends)
    change_low, change_high = numpy.nanquantile(spread[0][name] - spread[1][name], ends)
    return {
        "value": value,
        "low": float(low),
        "high": float(high),
        "reference": reference,
        "change": value - reference,
        "change_low": float(change_low),
        "change_high": float(change_high),
    }

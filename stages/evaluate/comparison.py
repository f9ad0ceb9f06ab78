"""How the answers differ from those of another model on the same texts, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pandas

from stages.core.metrics import Array
from stages.core.params import EvaluateParams, QualityParams
from stages.core.statistics import (
    bca_interval,
    bca_p_value,
    detectable_difference,
    mcnemar_p,
    non_inferiority_p,
    resample_difference,
    texts_to_show,
)

LOST, WON, MOVED = "right_to_wrong", "wrong_to_right", "wrong_to_wrong"
"""What can become of an answer that changes."""


def compare(
    variant: Array, other: Array, labels: Array, quality: QualityParams, params: EvaluateParams, seed: int
) -> dict[str, Any]:
    """Hold the variant's answers against another model's.

    Non-inferiority is tested one-sided at half the level of the interval, as medicine does (ICH E9, section 3.5): by
    the score test for paired proportions where the metric is accuracy, by the bootstrap where it is not.

    Args:
        variant: predicted classes, [texts].
        other: predicted classes of the other model, [texts].
        labels: true classes, [texts].
        quality: metric and floor.
        params: samples and confidence of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `difference` of the score with the `low` and `high` end of its BCa interval; `within_floor` tells whether the
        difference is within the quality floor, `surely_within_floor` whether the whole interval is; `non_inferior`
        whether the test shows it, with its `non_inferiority_p` and how many texts it needs where both models are
        equally good (`texts_to_show`, None for a floor of 0); `mcnemar_p`; `detectable_difference` of accuracy;
        `agreement`; and `flips` by kind.
    """
    resampled = resample_difference(quality.metric, variant, other, labels, params.bootstrap_samples, seed)
    low, high = bca_interval(resampled, params.confidence)
    flips = {kind: int((kinds_of_flips(other, variant, labels) == kind).sum()) for kind in (LOST, WON, MOVED)}
    lost, won, texts = flips[LOST], flips[WON], len(labels)
    level = 1 - params.confidence
    if quality.metric == "accuracy":
        method, p_value = "score test", non_inferiority_p(lost, won, texts, quality.floor)
    else:
        method, p_value = "bootstrap", bca_p_value(resampled, -quality.floor)
    return {
        "metric": quality.metric,
        "difference": resampled.estimate,
        "low": low,
        "high": high,
        "confidence": params.confidence,
        "floor": quality.floor,
        "within_floor": bool(resampled.estimate >= -quality.floor),
        "surely_within_floor": bool(low >= -quality.floor),
        "non_inferior": bool(p_value <= level / 2),
        "non_inferiority_p": p_value,
        "non_inferiority_method": method,
        "texts_to_show": texts_to_show((lost + won) / texts, quality.floor, level / 2),
        "mcnemar_p": mcnemar_p(lost, won),
        "detectable_difference": detectable_difference((lost + won) / texts, texts, level),
        "agreement": float((variant == other).mean()),
        "flips": flips,
    }


def kinds_of_flips(before: Array, after: Array, labels: Array) -> Array:
    """Tell of each text what became of its answer, [texts]; empty where it stayed the same."""
    changes = [(before == labels) & (after != labels), (before != labels) & (after == labels), before != after]
    return numpy.select(changes, [LOST, WON, MOVED], default="")


def flip_table(
    against: str, before: Array, after: Array, labels: Array, texts: Sequence[str], names: Sequence[str]
) -> pandas.DataFrame:
    """Every answer that changed: columns against, text, label, before, after and kind.

    Args:
        against: which model gave the answers before: `parent` or `reference`.
        before: its predicted classes, [texts].
        after: those of the variant, [texts].
        labels: true classes, [texts].
        texts: in the same order.
        names: of the classes.
    """
    kinds = kinds_of_flips(before, after, labels)
    changed = numpy.flatnonzero(kinds != "").tolist()
    return pandas.DataFrame(
        {
            "against": against,
            "text": [texts[index] for index in changed],
            "label": [names[index] for index in labels[changed]],
            "before": [names[index] for index in before[changed]],
            "after": [names[index] for index in after[changed]],
            "kind": kinds[changed],
        }
    )

"""How sure a difference between two models is that answered the same texts.

Nothing here knows models or files. A text counts as *lost* where the first model is wrong and the second right, as
*won* the other way round; such texts are discordant, and they alone carry the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from stages.core.metrics import Array, score, score_counts

POWER = 0.8
"""Chance of seeing a difference that is there, by which test sets are usually judged (Cohen 1988)."""


@dataclass(frozen=True)
class Resampled:
    """A difference of two scores with what the bootstrap and the jackknife make of it."""

    estimate: float
    """On the texts as they are."""
    draws: Array
    """On texts drawn again with replacement, [samples]."""
    left_out: Array
    """On all texts but one, [texts]."""


@dataclass(frozen=True)
class Corrected:
    """A p-value among others."""

    p_value: float
    corrected: float
    """By Holm's method over all that were compared."""
    significant: bool
    """Whether the corrected one is at most the level."""


def resample_difference(metric: str, first: Array, second: Array, labels: Array, samples: int, seed: int) -> Resampled:
    """Draw the texts again and again; both models keep their answers (Koehn 2004, EMNLP).

    Texts that are alike in label and both answers are one cell of a table, and drawing texts with replacement is
    drawing the counts of the cells from a multinomial: the same distribution, without moving a single text.

    Args:
        metric: accuracy, f1_macro or f1_weighted.
        first: predicted classes, [n].
        second: predicted classes of the other model, [n].
        labels: true classes, [n].
        samples: of the bootstrap.
        seed: of the draw.
    """
    estimate = score(metric, first, labels) - score(metric, second, labels)
    columns = [labels, first, second]
    if metric == "accuracy":  # right or wrong is all that counts: at most four cells, however many classes there are
        columns = [numpy.ones_like(labels), (first == labels).astype(int), (second == labels).astype(int)]
    cells, counts = numpy.unique(numpy.stack(columns, axis=1), axis=0, return_counts=True)
    draws = numpy.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=samples)
    left_out = _difference(metric, cells, counts - numpy.eye(len(cells), dtype=int))
    return Resampled(estimate, _difference(metric, cells, draws), numpy.repeat(left_out, counts))


def bca_interval(resampled: Resampled, confidence: float) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82).

    Where every draw gives the same value, as for two models with equal answers, the interval is that one point: the
    texts say nothing about how far apart the models could be. `non_inferiority_p` and `detectable_difference` do.

    Args:
        resampled: from `resample_difference`.
        confidence: such as 0.95.

    Returns:
        low, high.
    """
    if numpy.ptp(resampled.draws) == 0.0:
        return float(resampled.draws[0]), float(resampled.draws[0])
    bias, acceleration = _bias(resampled), _acceleration(resampled.left_out)
    normal = bias + ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = numpy.quantile(resampled.draws, ndtr(bias + normal / (1 - acceleration * normal)))
    return float(low), float(high)


def bca_p_value(resampled: Resampled, bound: float) -> float:
    """One-sided p-value of "the difference is at most `bound`": the level at which the lower BCa end just reaches it.

    Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 15. No smaller than half a draw.
    """
    share = _share_below(resampled.draws, bound)
    bias, acceleration = _bias(resampled), _acceleration(resampled.left_out)
    normal = ndtri(share) - bias
    return float(ndtr(normal / (1 + acceleration * normal) - bias))


def mcnemar_p(lost: int, won: int) -> float:
    """McNemar's exact test, two-sided (McNemar 1947; binomial form in Agresti, "Categorical Data Analysis"): p-value
    of "a discordant text is as likely lost as won".
    """
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def non_inferiority_p(lost: int, won: int, texts: int, margin: float) -> float:
    """One-sided p-value of "the first model's accuracy is lower by the margin or more".

    The score test for paired proportions (Tango 1998, Statistics in Medicine 17), which stays right where few texts
    are discordant, or none: there every bootstrap draw is zero and would prove anything.

    Args:
        lost: texts that the first model alone has wrong.
        won: texts that the second model alone has wrong.
        texts: all of them.
        margin: how much accuracy may be lost, as a share.
    """
    bound = -margin
    b = -lost - won + (2 * texts - won + lost) * bound
    c = -lost * bound * (1 - bound)
    rate_lost = (math.sqrt(b * b - 8 * texts * c) - b) / (4 * texts)  # most likely one if the bound were the truth
    variance = texts * (2 * rate_lost + bound * (1 - bound))
    shift = won - lost - texts * bound
    if variance <= 0.0:
        return 0.0 if shift > 0 else 1.0
    return float(ndtr(-shift / math.sqrt(variance)))


def holm(p_values: Array) -> Array:
    """Correct p-values for being many (Holm 1979, Scandinavian Journal of Statistics 6); in the order given."""
    order = numpy.argsort(p_values, kind="stable")
    factors = numpy.arange(len(p_values), 0, -1)
    corrected = numpy.empty(len(p_values))
    corrected[order] = numpy.minimum(numpy.maximum.accumulate(p_values[order] * factors), 1.0)
    return corrected


def compare_variants(p_values: Mapping[str, float], level: float) -> dict[str, Corrected]:
    """Correct the p-values of several variants, compared in the same way, so that the chance of one false alarm
    among them all stays at the level.
    """
    corrected = holm(numpy.array(list(p_values.values()), dtype=float))
    return {
        name: Corrected(p_value, float(value), bool(value <= level))
        for (name, p_value), value in zip(p_values.items(), corrected, strict=True)
    }


def detectable_difference(discordance: float, texts: int, level: float, power: float = POWER) -> float:
    """Smallest true difference of accuracy that McNemar's test on so many texts would find at the power.

    Connor 1987, "Sample size for testing differences in proportions for the paired-sample design" (Biometrics 43),
    solved for the difference. A difference needs at least as many discordant texts as itself: where fewer were seen,
    it brings its own.

    Args:
        discordance: share of the texts that one model alone has right.
        texts: in the test set.
        level: of the two-sided test, such as 0.05.
        power: chance of finding it.

    Returns:
        as a share; 1 where the test set is too small to show anything.
    """

    def excess(difference: float) -> float:
        share = max(discordance, difference)
        noise = -ndtri(level / 2) * math.sqrt(share) + ndtri(power) * math.sqrt(max(share - difference**2, 0.0))
        return float(math.sqrt(texts) * difference - noise)

    if excess(1.0) <= 0.0:
        return 1.0
    return float(brentq(excess, 1e-12, 1.0, xtol=1e-12))


def texts_to_show(discordance: float, margin: float, level: float, power: float = POWER) -> int | None:
    """How many texts a test set needs to show non-inferiority of two models that are equally good.

    The normal approximation to the paired test (Liu et al. 2002, Statistics in Medicine 21); no fewer than show it
    without a single discordant text.

    Args:
        discordance: share of the texts that one model alone has right.
        margin: how much accuracy may be lost, as a share.
        level: of the one-sided test, such as 0.025.
        power: chance of showing it.

    Returns:
        None where the margin is 0, which no number of texts can show.
    """
    if margin == 0.0:
        return None
    paired = float(ndtri(power) - ndtri(level)) ** 2 * discordance / margin**2
    without = float(ndtri(level)) ** 2 * (1 - margin) / margin
    return math.ceil(max(paired, without))


def _difference(metric: str, cells: Array, counts: Array) -> Array:
    """Score the first model less the second on tables of counts: cells [cells, (label, first, second)] and counts
    [tables, cells] give [tables].
    """
    classes = numpy.arange(cells.max() + 1)
    label, first, second = (column[:, None] == classes for column in cells.T)
    actual = counts @ label
    scores = [
        score_counts(metric, counts @ (label & answer), actual, counts @ answer.astype(int))
        for answer in (first, second)
    ]
    difference: Array = scores[0] - scores[1]
    return difference


def _bias(resampled: Resampled) -> float:
    return float(ndtri(_share_below(resampled.draws, resampled.estimate)))


def _share_below(draws: Array, value: float) -> float:
    """Share of the draws below a value, ties counted half; kept half a draw off 0 and 1, whose quantiles are infinite.

    Draws and value are sums in different orders: what lies within rounding of the value ties with it.
    """
    tie = numpy.isclose(draws, value, rtol=0.0, atol=1e-12)
    share = ((draws < value) & ~tie).mean() + tie.mean() / 2
    return float(numpy.clip(share, 0.5 / len(draws), 1 - 0.5 / len(draws)))


def _acceleration(left_out: Array) -> float:
    """Skewness of the estimate, from the jackknife."""
    influence = left_out.mean() - left_out
    spread = float((influence**2).sum())
    return float((influence**3).sum() / (6 * spread**1.5)) if spread > 0.0 else 0.0

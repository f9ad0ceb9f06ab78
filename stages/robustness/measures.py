"""What answers to clean, changed and foreign texts say: pure functions of what was right."""

from __future__ import annotations

import numpy
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from stages.core.metrics import Array

_DRAWS_AT_ONCE = 500


def perturbation_measures(clean: Array, perturbed: Array, labels: Array) -> dict[str, float]:
    """Score the answers to perturbed copies beside those to the clean texts.

    Args:
        clean: answers to the clean texts, [texts].
        perturbed: answers to their copies, [copies, texts].
        labels: what is right, [texts].

    Returns:
        `accuracy` (mean over the copies), `drop` (against the clean texts), `worst_case` (share of texts with all
        copies right), `consistency` (share of copies with the answer of the clean text).
    """
    right = perturbed == labels
    return {
        "accuracy": float(right.mean()),
        "drop": float((clean == labels).mean() - right.mean()),
        "worst_case": float(right.all(axis=0).mean()),
        "consistency": float((perturbed == clean).mean()),
    }


def lost_copies(clean: Array, perturbed: Array, labels: Array) -> Array:
    """How many copies of each text are wrong where the text was right, less how many are right where it was wrong.

    Whole numbers, [texts], so that differences of them that are zero are exactly that.
    """
    lost: Array = len(perturbed) * (clean == labels).astype(numpy.int64) - (perturbed == labels).sum(axis=0)
    return lost


def mean_intervals(values: Array, samples: int, confidence: float, seed: int) -> tuple[Array, Array]:
    """Percentile bootstrap of the mean of each column, all columns from the same draws of rows.

    Args:
        values: [texts, columns].
        samples: of the bootstrap.
        confidence: of each interval.
        seed: of the draws.

    Returns:
        low and high, [columns].
    """
    generator = numpy.random.default_rng(seed)
    sizes = [min(_DRAWS_AT_ONCE, samples - start) for start in range(0, samples, _DRAWS_AT_ONCE)]
    means = [_counts(len(values), size, generator) @ values / len(values) for size in sizes]
    low, high = numpy.quantile(numpy.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def each_of_many(confidence: float, count: int) -> float:
    """Confidence of each of `count` intervals that hold together with `confidence` (Bonferroni)."""
    return 1.0 - (1.0 - confidence) / max(1, count)


def accuracy_interval(right: Array, confidence: float) -> dict[str, float]:
    """Share of right answers [texts] with Wilson's interval."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(confidence, method="wilson")
    return {"accuracy": float(right.mean()), "low": float(interval.low), "high": float(interval.high)}


def detection(own: Array, foreign: Array, samples: int, confidence: float, seed: int) -> dict[str, float]:
    """How well a score tells own texts from foreign ones, by the area under the ROC curve.

    Args:
        own: scores of own texts, which should be the higher ones.
        foreign: scores of foreign texts.
        samples: of the bootstrap, which draws both anew.
        confidence: of its percentile interval.
        seed: of the draws.

    Returns:
        `auroc`, `low`, `high`; 0.5 is chance.
    """
    truth = numpy.repeat([1, 0], [len(own), len(foreign)])
    auroc = float(roc_auc_score(truth, numpy.concatenate([own, foreign])))
    # The area is the share of pairs in the right order, ties counting half (Mann & Whitney 1947).
    pairs = (own[:, None] > foreign) + 0.5 * (own[:, None] == foreign)
    generator = numpy.random.default_rng(seed)
    sizes = [min(_DRAWS_AT_ONCE, samples - start) for start in range(0, samples, _DRAWS_AT_ONCE)]
    areas = [
        ((_counts(len(own), size, generator) @ pairs) * _counts(len(foreign), size, generator)).sum(axis=1)
        for size in sizes
    ]
    low, high = numpy.quantile(numpy.concatenate(areas) / pairs.size, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"auroc": auroc, "low": float(low), "high": float(high)}


def _counts(texts: int, samples: int, generator: numpy.random.Generator) -> Array:
    """Draw texts with replacement; return how often each is in each sample, [samples, texts]."""
    drawn = generator.integers(0, texts, size=(samples, texts)) + texts * numpy.arange(samples)[:, None]
    counts: Array = numpy.bincount(drawn.ravel(), minlength=samples * texts).reshape(samples, texts)
    return counts

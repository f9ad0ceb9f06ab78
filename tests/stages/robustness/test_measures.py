from __future__ import annotations

import numpy
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from stages.robustness.measures import (
    accuracy_interval,
    detection,
    each_of_many,
    lost_copies,
    mean_intervals,
    perturbation_measures,
)

LABELS = numpy.array([0, 1, 1, 0])
CLEAN = numpy.array([0, 1, 0, 1])
COPIES = numpy.array([[0, 1, 1, 1], [0, 0, 0, 1]])


def test_perturbations_are_scored_as_by_hand() -> None:
    # Right: clean T T F F; first copy T T T F; second T F F F.
    assert perturbation_measures(CLEAN, COPIES, LABELS) == {
        "accuracy": 4 / 8, "drop": 0.0, "worst_case": 1 / 4, "consistency": 6 / 8,
    }  # fmt: skip
    assert lost_copies(CLEAN, COPIES, LABELS).tolist() == [0, 1, -1, 0]


def test_the_drop_is_the_mean_loss() -> None:
    generator = numpy.random.default_rng(1)
    labels, clean, copies = (generator.integers(0, 3, size) for size in (50, 50, (4, 50)))
    drop = perturbation_measures(clean, copies, labels)["drop"]
    assert drop == pytest.approx(lost_copies(clean, copies, labels).mean() / 4)


def test_intervals_agree_with_scipy() -> None:
    values = numpy.random.default_rng(3).normal(0.1, 1.0, (200, 2))
    low, high = mean_intervals(values, 20_000, 0.95, 5)
    for column in range(2):
        theirs = bootstrap(
            (values[:, column],), numpy.mean, n_resamples=20_000, method="percentile", rng=numpy.random.default_rng(7)
        ).confidence_interval
        assert (low[column], high[column]) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_an_interval_of_a_constant_has_no_width_and_columns_share_their_draws() -> None:
    values = numpy.random.default_rng(3).normal(size=(40, 1))
    low, high = mean_intervals(numpy.hstack([numpy.full((40, 1), 0.25), values, values + 1.0]), 1100, 0.9, 5)
    assert (low[0], high[0]) == pytest.approx((0.25, 0.25))
    assert (low[2], high[2]) == pytest.approx((low[1] + 1.0, high[1] + 1.0))
    assert low[1] < values.mean() < high[1]


def test_one_interval_of_many_is_stricter() -> None:
    assert each_of_many(0.95, 10) == pytest.approx(0.995)
    assert each_of_many(0.95, 1) == pytest.approx(0.95)


def test_accuracy_has_wilsons_interval() -> None:
    right = numpy.repeat([True, False], [45, 5])
    found = accuracy_interval(right, 0.95)
    assert found["accuracy"] == 0.9
    theirs = proportion_confint(45, 50, alpha=0.05, method="wilson")
    assert (found["low"], found["high"]) == pytest.approx(theirs, abs=1e-9)


def test_detection_is_the_area_under_the_curve() -> None:
    own, foreign = numpy.array([3.0, 2.0]), numpy.array([1.0, 2.0])
    assert detection(own, foreign, 100, 0.95, 1)["auroc"] == 3.5 / 4
    assert detection(foreign, own, 100, 0.95, 1)["auroc"] == 0.5 / 4
    assert detection(own + 5, foreign, 100, 0.95, 1) == {"auroc": 1.0, "low": 1.0, "high": 1.0}


def test_the_interval_of_detection_is_the_bootstrap_of_the_area() -> None:
    generator = numpy.random.default_rng(2)
    own, foreign = generator.normal(0.8, 1.0, 80), generator.normal(0.0, 1.0, 60)
    found = detection(own, foreign, 2000, 0.9, 4)
    drawn = [
        roc_auc_score(
            [1] * 80 + [0] * 60, numpy.concatenate([generator.choice(own, 80), generator.choice(foreign, 60)])
        )
        for _ in range(400)
    ]
    assert (found["low"], found["high"]) == pytest.approx(tuple(numpy.quantile(drawn, [0.05, 0.95])), abs=0.02)

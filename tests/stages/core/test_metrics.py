import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from stages.core.metrics import (
    calibration_error,
    calibration_table,
    classification_metrics,
    log_loss,
    paired_bootstrap,
    score,
    softmax,
)

# Four texts, three classes: predictions 0, 1, 1, 2 against labels 0, 1, 2, 2.
PROBABILITIES = numpy.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.5, 0.4], [0.0, 0.1, 0.9]])
LABELS = numpy.array([0, 1, 2, 2])


def test_quality_of_a_case_worked_by_hand() -> None:
    metrics = classification_metrics(PROBABILITIES, LABELS, ["a", "b", "c"], calibration_bins=10)
    quality, per_class = metrics["quality"], metrics["per_class"]
    assert quality["accuracy"] == 0.75
    assert per_class["b"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert per_class["c"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert quality["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert quality["f1_weighted"] == pytest.approx((1 + 2 / 3 + 2 * 2 / 3) / 4)
    assert quality["log_loss"] == pytest.approx(-numpy.log([0.7, 0.6, 0.4, 0.9]).mean())


def test_calibration_error_worked_by_hand() -> None:
    # Each text sits in a bin of its own: gaps 0.3, 0.4, 0.5 and 0.1.
    assert calibration_error(PROBABILITIES, LABELS, bins=10) == pytest.approx((0.3 + 0.4 + 0.5 + 0.1) / 4)
    assert sum(row["count"] for row in calibration_table(PROBABILITIES, LABELS, bins=3)) == 4


def test_a_perfectly_calibrated_model_has_no_error() -> None:
    probabilities = numpy.tile([0.75, 0.25], (4, 1))
    assert calibration_error(probabilities, numpy.array([0, 0, 0, 1]), bins=10) == pytest.approx(0.0)


def test_log_loss_of_a_certain_mistake_is_finite() -> None:
    assert numpy.isfinite(log_loss(numpy.array([[1.0, 0.0]]), numpy.array([1])))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_f1_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = (numpy.array(column) for column in zip(*pairs, strict=True))
    for average in ("macro", "weighted"):
        wanted = f1_score(labels, predictions, average=average, zero_division=0)
        assert score(f"f1_{average}", predictions, labels) == pytest.approx(wanted)


def test_bootstrap_of_equal_models_is_zero_and_of_a_better_one_is_positive() -> None:
    labels = numpy.arange(200) % 2
    worse = labels.copy()
    worse[:40] = 1 - worse[:40]
    assert paired_bootstrap("accuracy", labels, labels, labels, 200, 0.95, 0) == (0.0, 0.0, 0.0)
    difference, low, high = paired_bootstrap("accuracy", labels, worse, labels, 500, 0.95, 0)
    assert difference == pytest.approx(0.2)
    assert 0.1 < low < 0.2 < high < 0.3


def test_bootstrap_interval_matches_the_normal_approximation() -> None:
    generator = numpy.random.default_rng(0)
    labels = generator.integers(0, 2, 2000)
    first = numpy.where(generator.random(2000) < 0.9, labels, 1 - labels)
    second = numpy.where(generator.random(2000) < 0.88, labels, 1 - labels)
    paired = (first == labels).astype(float) - (second == labels)
    spread = 1.96 * paired.std() / numpy.sqrt(2000)
    difference, low, high = paired_bootstrap("accuracy", first, second, labels, 2000, 0.95, 0)
    assert low == pytest.approx(difference - spread, abs=0.003)
    assert high == pytest.approx(difference + spread, abs=0.003)


def test_softmax_of_large_logits() -> None:
    assert softmax(numpy.array([[1000.0, 1000.0], [0.0, numpy.log(3)]])) == pytest.approx(
        numpy.array([[0.5, 0.5], [0.25, 0.75]])
    )

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.cascade.threshold import Answers, Point, candidate_thresholds, choose, trade_off
from stages.core.cascade import confidence_of, passed_on
from stages.core.params import CascadeParams

PARAMS = CascadeParams(enabled=True, tolerated_loss=0.0, confidence=0.9, bootstrap_samples=200)


def binary(confidence: list[float], predictions: list[int]) -> numpy.ndarray:
    """Probabilities of two classes with these predictions, each of which is so sure."""
    table = numpy.array([[sure, 1 - sure] for sure in confidence], dtype=numpy.float32)
    for row, prediction in enumerate(predictions):
        table[row] = table[row][::-1] if prediction else table[row]
    return table


def answers(confidence: list[float], small_right: list[bool], large_right: list[bool]) -> Answers:
    """Both models' answers to texts of class 0."""
    small = binary(confidence, [0 if right else 1 for right in small_right])
    large = binary([0.9] * len(confidence), [0 if right else 1 for right in large_right])
    return Answers(small, large, numpy.zeros(len(confidence), dtype=numpy.int64))


# Ten texts, from the least to the most sure. The small model errs on the first two, where the larger one does not.
SURE = [0.51, 0.55, 0.61, 0.65, 0.71, 0.75, 0.81, 0.85, 0.91, 0.95]
TWO_HARD_ONES = answers(SURE, [False, False, *[True] * 8], [True] * 10)


def test_two_hard_texts_are_passed_on_and_no_more() -> None:
    chosen = choose(trade_off(TWO_HARD_ONES, "accuracy", 0.2, PARAMS, seed=1))
    assert chosen.threshold == pytest.approx((0.55 + 0.61) / 2, abs=1e-6)
    assert (chosen.passed_on, chosen.quality, chosen.difference) == (0.2, 1.0, 0.0)
    assert chosen.cost == pytest.approx(0.4)


def test_a_tolerated_loss_lets_the_small_model_keep_more() -> None:
    generous = PARAMS.model_copy(update={"tolerated_loss": 0.5})
    chosen = choose(trade_off(TWO_HARD_ONES, "accuracy", 0.2, generous, seed=1))
    assert (chosen.threshold, chosen.passed_on) == (0.0, 0.0)
    assert chosen.quality == pytest.approx(0.8)


def test_the_interval_counts_and_not_the_difference_alone() -> None:
    # One error in ten is a loss of 0.1; among ten texts drawn again there may be two or three of it.
    one_error = answers(SURE, [False, *[True] * 9], [True] * 10)
    exactly = PARAMS.model_copy(update={"tolerated_loss": 0.1})
    points = trade_off(one_error, "accuracy", 0.2, exactly, seed=1)
    assert points[0].difference == pytest.approx(-0.1)
    assert points[0].low < -0.1
    assert choose(points).passed_on == pytest.approx(0.1)


def test_what_fails_on_the_way_down_ends_the_walk() -> None:
    # Sure and wrong at the seventh text, then unsure and right where the larger model is wrong: all kept, the two make
    # up for each other, but no threshold between may be jumped over.
    there_and_back = answers(SURE, [*[True] * 6, False, *[True] * 3], [True, False, *[True] * 8])
    points = trade_off(there_and_back, "accuracy", 0.2, PARAMS, seed=1)
    assert points[0].difference == 0.0
    assert not points[0].admissible
    assert choose(points).passed_on == pytest.approx(0.7)


def test_where_both_cost_more_than_the_larger_model_it_answers_alone() -> None:
    hopeless = answers(SURE, [True, *[False] * 9], [True] * 10)
    points = trade_off(hopeless, "accuracy", 0.3, PARAMS, seed=1)
    chosen = choose(points)
    assert (chosen.threshold, chosen.passed_on, chosen.cost) == (1.0, 1.0, 1.0)
    wrong_when_sure = answers(SURE, [*[True] * 9, False], [True] * 10)
    assert choose(trade_off(wrong_when_sure, "accuracy", 0.3, PARAMS, seed=1)).threshold == 1.0
    # Eight of ten passed on at a third of the price is more than the whole price.
    kept_two = answers(SURE, [*[True] * 7, False, True, True], [True] * 10)
    assert choose(trade_off(kept_two, "accuracy", 0.3, PARAMS, seed=1)).threshold == 1.0
    assert choose(trade_off(kept_two, "accuracy", 0.1, PARAMS, seed=1)).passed_on == pytest.approx(0.8)


def test_candidates_lie_between_neighbours_and_at_both_ends() -> None:
    assert candidate_thresholds(numpy.array([0.5, 0.75, 0.75, 1.0])) == [0.0, 0.625, 0.875, 1.0]
    assert candidate_thresholds(numpy.array([1.0, 1.0])) == [0.0, 1.0]
    many = candidate_thresholds(numpy.linspace(0.3, 1.0, 5000))
    assert len(many) == 101
    assert many == sorted(many)


def test_a_threshold_between_neighbours_of_single_precision_parts_them() -> None:
    low = numpy.float32(0.75)
    high = numpy.nextafter(low, numpy.float32(1.0))
    table = numpy.array([[low, 0.25], [high, 0.25]], dtype=numpy.float32)
    threshold = candidate_thresholds(confidence_of(table))[1]
    assert passed_on(table, threshold).tolist() == [True, False]


tables = st.integers(2, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=classes, max_size=classes), min_size=1, max_size=40
    )
)


def softmax32(logits: list[list[float]]) -> numpy.ndarray:
    from stages.core.metrics import softmax

    return softmax(numpy.array(logits, dtype=numpy.float32))


@given(tables, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_passes_on_the_same_texts_and_more(
    logits: list[list[float]], one: float, other: float
) -> None:
    table = softmax32(logits)
    lower, higher = passed_on(table, min(one, other)), passed_on(table, max(one, other))
    assert not (lower & ~higher).any()


@given(tables)
def test_zero_passes_none_on_and_one_all(logits: list[list[float]]) -> None:
    table = softmax32(logits)
    assert not passed_on(table, 0.0).any()
    assert passed_on(table, 1.0).all()


@given(tables, st.integers(0, 2**16), st.sampled_from(["accuracy", "f1_macro"]))
def test_the_curve_goes_from_the_small_model_to_the_larger_one(
    logits: list[list[float]], seed: int, metric: str
) -> None:
    small = softmax32(logits)
    generator = numpy.random.default_rng(seed)
    large = generator.dirichlet(numpy.ones(small.shape[1]), len(small)).astype(numpy.float32)
    labels = generator.integers(0, small.shape[1], len(small))
    both = Answers(small, large, labels)
    points = trade_off(both, metric, 0.2, PARAMS.model_copy(update={"bootstrap_samples": 20}), seed)
    assert (both.together(0.0) == small.argmax(axis=1)).all()
    assert (both.together(1.0) == large.argmax(axis=1)).all()
    shares = [point.passed_on for point in points]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)
    assert (points[-1].difference, points[-1].low, points[-1].admissible) == (0.0, 0.0, True)
    kept = [point.admissible for point in points]
    assert kept == sorted(kept), "what is admissible reaches from some threshold up to 1"
    chosen: Point = choose(points)
    assert chosen.admissible
    assert chosen.cost <= 1.0

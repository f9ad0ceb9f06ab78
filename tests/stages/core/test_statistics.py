from __future__ import annotations

import numpy
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from stages.core.metrics import score
from stages.core.statistics import (
    Resampled,
    bca_interval,
    bca_p_value,
    compare_variants,
    detectable_difference,
    holm,
    mcnemar_p,
    non_inferiority_p,
    resample_difference,
    texts_to_show,
)

Answers = tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]
METRICS = ("accuracy", "f1_macro", "f1_weighted")


def answers(texts: int, seed: int, classes: int = 3, shares: tuple[float, float] = (0.85, 0.8)) -> Answers:
    """Answers of two models that are right on so large shares of the texts, and the labels."""
    random = numpy.random.default_rng(seed)
    labels = random.integers(0, classes, texts)
    first, second = (
        numpy.where(random.random(texts) < share, labels, random.integers(0, classes, texts)) for share in shares
    )
    return first, second, labels


def paired(texts: int, lost: float, won: float, random: numpy.random.Generator) -> Answers:
    """A test set from a world in which a text is lost and won with these chances, and else both are right."""
    draw = random.random(texts)
    right = numpy.ones(texts, dtype=int)
    return numpy.where(draw < lost, 0, 1), numpy.where(draw > 1 - won, 0, 1), right


@pytest.mark.parametrize("metric", METRICS)
def test_bca_agrees_with_scipy_on_the_same_draws(metric: str) -> None:
    first, second, labels = answers(150, seed=1)

    def difference(a: numpy.ndarray, b: numpy.ndarray, truth: numpy.ndarray) -> float:
        if metric == "accuracy":  # one division: scipy counts draws that differ from the estimate by rounding as others
            return float(((a == truth).sum() - (b == truth).sum()) / len(truth))
        return score(metric, a, truth) - score(metric, b, truth)

    known = scipy.stats.bootstrap(
        (first, second, labels), difference, paired=True, vectorized=False, n_resamples=400, method="BCa", rng=2
    )
    own = resample_difference(metric, first, second, labels, 400, seed=0)
    low, high = bca_interval(Resampled(own.estimate, known.bootstrap_distribution, own.left_out), 0.95)
    assert low == pytest.approx(known.confidence_interval.low, abs=1e-6)
    assert high == pytest.approx(known.confidence_interval.high, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_drawing_cells_is_drawing_texts(metric: str) -> None:
    first, second, labels = answers(300, seed=3)
    own = resample_difference(metric, first, second, labels, 6000, seed=0)
    random = numpy.random.default_rng(1)
    picks = [random.integers(0, 300, 300) for _ in range(3000)]
    texts = [score(metric, first[p], labels[p]) - score(metric, second[p], labels[p]) for p in picks]
    assert own.draws.mean() == pytest.approx(numpy.mean(texts), abs=0.002)
    assert own.draws.std() == pytest.approx(numpy.std(texts), rel=0.06)
    rest = [numpy.delete(numpy.arange(300), index) for index in range(300)]
    left_out = [score(metric, first[r], labels[r]) - score(metric, second[r], labels[r]) for r in rest]
    assert sorted(own.left_out) == pytest.approx(sorted(left_out), abs=1e-12)


@pytest.mark.parametrize(("texts", "lost", "won"), [(500, 0.05, 0.03), (537, 0.02, 0.02), (200, 0.08, 0.02)])
def test_the_interval_covers_the_truth(texts: int, lost: float, won: float) -> None:
    random = numpy.random.default_rng(4)
    covered = 0
    for seed in range(1000):
        low, high = bca_interval(resample_difference("accuracy", *paired(texts, lost, won, random), 1000, seed), 0.95)
        covered += low - 1e-12 <= won - lost <= high + 1e-12
    assert 930 <= covered <= 970


def test_equal_answers_give_a_point_and_still_no_proof() -> None:
    labels = numpy.arange(45) % 3
    same = resample_difference("f1_macro", labels, labels, labels, 200, seed=0)
    assert bca_interval(same, 0.95) == (0.0, 0.0)
    assert mcnemar_p(0, 0) == 1.0
    assert non_inferiority_p(0, 0, 45, 0.01) > 0.2  # 45 texts cannot show one percent, however well they went
    assert non_inferiority_p(0, 0, 1000, 0.01) < 0.001


def test_a_model_that_is_wrong_everywhere_has_an_interval() -> None:
    labels = numpy.zeros(40, dtype=int)
    worst = resample_difference("accuracy", labels + 1, labels, labels, 100, seed=0)
    assert bca_interval(worst, 0.95) == (-1.0, -1.0)


@given(st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_mcnemar_agrees_with_statsmodels(lost: int, won: int) -> None:
    known = mcnemar([[10, lost], [won, 10]], exact=True).pvalue
    assert mcnemar_p(lost, won) == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 6, 11])
def test_holm_agrees_with_statsmodels(count: int) -> None:
    p_values = numpy.random.default_rng(count).random(count) ** 3
    p_values[-1] = p_values[0]  # ties
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-6)


def test_variants_are_corrected_together() -> None:
    found = compare_variants({"a": 0.02, "b": 0.5, "c": 0.01}, level=0.05)
    assert {name: one.corrected for name, one in found.items()} == pytest.approx({"a": 0.04, "b": 0.5, "c": 0.03})
    assert [one.significant for one in found.values()] == [True, False, True]
    assert [one.p_value for one in found.values()] == [0.02, 0.5, 0.01]
    assert compare_variants({}, level=0.05) == {}


def test_non_inferiority_of_the_published_example() -> None:
    # Tango 1998, table 2: of 44 patients one failed on the new treatment alone; Z = 1.709 for a margin of 10 %.
    assert scipy.stats.norm.isf(non_inferiority_p(1, 0, 44, 0.1)) == pytest.approx(1.709, abs=5e-4)


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.005, 0.2))
@settings(max_examples=40, deadline=None)
def test_non_inferiority_is_the_score_test(lost: int, won: int, margin: float) -> None:
    """The nuisance rate under the bound, found by searching for the largest likelihood."""
    texts = 100

    def misfit(rate: float) -> float:
        chances = numpy.array([rate, rate - margin, 1 - 2 * rate + margin])
        return -float((numpy.array([lost, won, texts - lost - won]) * numpy.log(numpy.maximum(chances, 1e-300))).sum())

    rate = minimize_scalar(misfit, bounds=(margin, (1 + margin) / 2), method="bounded", options={"xatol": 1e-10}).x
    z = (won - lost + texts * margin) / numpy.sqrt(texts * (2 * rate - margin - margin**2))
    assert non_inferiority_p(lost, won, texts, margin) == pytest.approx(scipy.stats.norm.sf(z), abs=1e-4)


def test_non_inferiority_without_a_margin() -> None:
    assert non_inferiority_p(0, 0, 100, 0.0) == 1.0
    assert non_inferiority_p(9, 1, 100, 0.0) == pytest.approx(scipy.stats.norm.sf(-8 / numpy.sqrt(10)))
    assert non_inferiority_p(0, 0, 100, 1.0) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_the_bootstrap_p_value_is_the_level_at_which_the_interval_touches_the_bound(metric: str) -> None:
    resampled = resample_difference(metric, *answers(400, seed=5), 4000, seed=0)
    for bound in (-0.02, 0.0, 0.03):
        p_value = bca_p_value(resampled, bound)
        assert 0.0 < p_value < 0.5
        low, _ = bca_interval(resampled, 1 - 2 * p_value)
        assert low == pytest.approx(bound, abs=0.003)


def test_a_true_loss_of_the_margin_is_called_non_inferior_as_often_as_the_level_says() -> None:
    random = numpy.random.default_rng(6)
    counts = random.multinomial(600, [0.035, 0.015, 0.95], size=4000)
    found = numpy.mean([non_inferiority_p(lost, won, 600, 0.02) <= 0.05 for lost, won, _ in counts])
    assert 0.035 < found < 0.065


def test_the_detectable_difference_solves_connors_formula() -> None:
    found = detectable_difference(0.1, 500, level=0.05)
    z = scipy.stats.norm.ppf
    needed = (z(0.975) * numpy.sqrt(0.1) + z(0.8) * numpy.sqrt(0.1 - found**2)) ** 2 / found**2
    assert needed == pytest.approx(500, rel=1e-6)
    assert detectable_difference(0.0, 500, level=0.05) < found  # few discordant texts make the test sharper
    assert detectable_difference(0.1, 3, level=0.05) == 1.0


def test_the_detectable_difference_is_found_at_the_power() -> None:
    difference = detectable_difference(0.1, 1000, level=0.05)
    chances = [0.05 + difference / 2, 0.05 - difference / 2, 0.9]
    lost, won, _ = numpy.random.default_rng(7).multinomial(1000, chances, size=20_000).T
    found = numpy.abs(lost - won) / numpy.sqrt(lost + won) > scipy.stats.norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_so_many_texts_show_non_inferiority_at_the_power() -> None:
    texts = texts_to_show(0.04, 0.02, level=0.025)
    assert texts is not None
    counts = numpy.random.default_rng(8).multinomial(texts, [0.02, 0.02, 0.96], size=3000)
    shown = numpy.mean([non_inferiority_p(lost, won, texts, 0.02) <= 0.025 for lost, won, _ in counts])
    assert shown == pytest.approx(0.8, abs=0.05)
    without = texts_to_show(0.0, 0.02, level=0.025)
    assert without is not None
    assert non_inferiority_p(0, 0, without, 0.02) <= 0.025 < non_inferiority_p(0, 0, without - 1, 0.02)
    assert texts_to_show(0.04, 0.0, level=0.025) is None

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.review.doubts import confident_classes, confident_joint, label_doubts, noise_rate
from stages.review.judge import out_of_sample, small_classes

# Two classes; thresholds by hand: class 0 (0.9 + 0.8 + 0.1) / 3 = 0.6, class 1 (0.8 + 0.7 + 0.3) / 3 = 0.6.
SOLVED = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.7, 0.3]])
GIVEN = numpy.array([0, 0, 0, 1, 1, 1])


def test_the_joint_solved_by_hand() -> None:
    assert confident_classes(SOLVED, GIVEN).tolist() == [0, 0, 1, 1, 1, 0]
    assert confident_joint(SOLVED, GIVEN).tolist() == [[2, 1], [1, 2]]
    assert noise_rate(SOLVED, GIVEN) == pytest.approx(1 / 3)
    found = label_doubts(SOLVED, GIVEN)
    assert [(doubt.index, doubt.suggestion) for doubt in found] == [(2, 1), (5, 0)]
    assert [doubt.margin for doubt in found] == pytest.approx([0.8, 0.4])


def test_thresholds_make_up_for_a_model_that_is_less_sure_of_one_class() -> None:
    # Class 1 never gets more than 0.45 (threshold 0.42), so an argmax would call its mislabelled text right.
    probabilities = numpy.array([[0.95, 0.05]] * 8 + [[0.56, 0.44]] + [[0.58, 0.42]] * 4)
    labels = numpy.array([0] * 9 + [1] * 4)
    assert probabilities[8].argmax() == labels[8]
    assert confident_classes(probabilities, labels)[8] == 1
    assert [doubt.index for doubt in label_doubts(probabilities, labels)] == [8]


def test_a_class_without_texts_is_never_suggested() -> None:
    probabilities = numpy.array([[0.2, 0.1, 0.7], [0.1, 0.6, 0.3]])
    assert label_doubts(probabilities, numpy.array([0, 1])) == []


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_what_is_doubted_is_never_the_label_given(seed: int, classes: int) -> None:
    random = numpy.random.default_rng(seed)
    probabilities = random.dirichlet(numpy.ones(classes), 40)
    labels = random.integers(0, classes, 40)
    found = label_doubts(probabilities, labels)
    assert all(labels[doubt.index] != doubt.suggestion for doubt in found)
    assert [doubt.margin for doubt in found] == sorted((doubt.margin for doubt in found), reverse=True)
    assert len({doubt.index for doubt in found}) == len(found)
    assert confident_joint(probabilities, labels).sum() <= len(labels)
    assert 0.0 <= noise_rate(probabilities, labels) <= 1.0


def planted(share: float) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Four clusters in 16 dimensions; some labels moved to the next class."""
    random = numpy.random.default_rng(2)
    true = numpy.arange(800) % 4
    embeddings = random.normal(size=(800, 16)) + 4.0 * numpy.eye(4, 16)[true]
    wrong = random.random(800) < share
    return embeddings, numpy.where(wrong, (true + 1) % 4, true), wrong


def test_planted_noise_is_found() -> None:
    embeddings, labels, wrong = planted(0.05)
    probabilities = out_of_sample(embeddings, labels, 4, 5, seed=1)
    found = numpy.array([doubt.index for doubt in label_doubts(probabilities, labels)])
    assert wrong[found].sum() / wrong.sum() > 0.85  # recall
    assert wrong[found].mean() > 0.8  # precision
    assert noise_rate(probabilities, labels) == pytest.approx(wrong.mean(), abs=0.02)


def test_few_labels_are_doubted_where_all_are_right() -> None:
    embeddings, labels, _ = planted(0.0)
    assert len(label_doubts(out_of_sample(embeddings, labels, 4, 5, seed=1), labels)) < 0.03 * len(labels)


def test_classes_too_small_for_the_folds_are_left_out_and_never_doubted() -> None:
    embeddings, labels, _ = planted(0.05)
    labels = labels.copy()
    labels[:3] = 4
    assert small_classes(labels, 5, 5) == [4]
    probabilities = out_of_sample(embeddings, labels, 5, 5, seed=1)
    assert numpy.allclose(probabilities.sum(axis=1), 1.0)
    assert not {0, 1, 2} & {doubt.index for doubt in label_doubts(probabilities, labels)}
    assert label_doubts(out_of_sample(embeddings[:4], labels[:4], 5, 5, seed=1), labels[:4]) == []

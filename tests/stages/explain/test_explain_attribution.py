from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from stages.core.judging import predict_logits
from stages.core.metrics import softmax
from stages.core.params import ExplainParams
from stages.explain.attribution import Integrated, integrated_gradients, lime_weights, shapley_values
from stages.explain.reader import Reader, Reading, read_together
from stages.explain.smooth import SmoothLinear, smooth_twin


class BagOfWords(nn.Module):
    """Two classes, logits linear in the words: the first class's is the sum of one number a word."""

    def __init__(self, numbers: list[float]):
        super().__init__()
        self.table = nn.Embedding(len(numbers), 1)
        self.table.weight = nn.Parameter(torch.tensor(numbers)[:, None], requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        score = (self.table(input_ids)[..., 0] * attention_mask).sum(dim=1)
        return SimpleNamespace(logits=torch.stack([score, torch.zeros_like(score)], dim=1))


def read_all(reader: Reader, texts: list[str]) -> tuple[list[list[str]], list[Reading], list[int]]:
    found = [read_together(text, [reader]) for text in texts]
    words, readings = [words for words, _ in found], [reading for _, (reading,) in found]
    logits = predict_logits(reader.model, [reading.input_ids for reading in readings], reader.pad_id)
    return words, readings, logits.argmax(dim=1).tolist()


@pytest.fixture(params=["float", "quantized"])
def either(request: pytest.FixtureRequest, reader: Reader, quantized_reader: Reader) -> Reader:
    return reader if request.param == "float" else quantized_reader


@pytest.fixture
def integrated(either: Reader, texts: list[str], explain_params: ExplainParams) -> tuple[list[list[str]], Integrated]:
    words, readings, answers = read_all(either, texts)
    return words, integrated_gradients(either, readings, answers, explain_params)


def test_integrated_gradients_are_complete_and_name_the_planted_word(
    integrated: tuple[list[list[str]], Integrated],
    planted: Any,
) -> None:
    _, found = integrated
    sums = numpy.array([shares.sum() for shares in found.words])
    assert (numpy.abs(sums - found.differences) <= 0.01 * numpy.maximum(numpy.abs(found.differences), 1.0)).all()
    assert found.errors.max() <= 0.01
    named = [shares.argmax() == place for place, shares in zip(planted.places, found.words, strict=True)]
    assert numpy.mean(named) >= 0.95


def test_too_few_steps_are_seen_and_doubled(reader: Reader, texts: list[str], explain_params: ExplainParams) -> None:
    _, readings, answers = read_all(reader, texts[:12])
    hasty = explain_params.model_copy(update={"steps": 1, "most_steps": 1})
    assert integrated_gradients(reader, readings, answers, hasty).errors.max() > 0.01
    patient = explain_params.model_copy(update={"steps": 1, "most_steps": 256})
    found = integrated_gradients(reader, readings, answers, patient)
    assert found.errors.max() <= 0.01
    assert found.steps.min() < found.steps.max()


def test_a_linear_model_is_explained_in_closed_form(reader: Reader, explain_params: ExplainParams) -> None:
    numbers = [0.0, 5.0, 7.0, -3.0, 0.5, 1.0, -2.0, 4.0]  # 4 is the token of absence
    model = BagOfWords(numbers)
    simple = replace(reader, model=model, smooth=model)
    reading = Reading([2, 5, 6, 7, 3], [-1, 0, 1, 1, -1])
    found = integrated_gradients(simple, [reading], [0], explain_params)
    expected = [numbers[5] - numbers[4], numbers[6] + numbers[7] - 2 * numbers[4]]
    numpy.testing.assert_allclose(found.words[0], expected, rtol=1e-5)
    # Against the other class the same words speak the other way.
    against = integrated_gradients(simple, [reading], [1], explain_params)
    numpy.testing.assert_allclose(against.words[0], [-value for value in expected], rtol=1e-5)


def test_shapley_values_and_lime_of_a_linear_value_are_its_weights() -> None:
    weights = numpy.array([1.5, -2.0, 0.0, 0.25, 3.0, 0.0, 1.0])

    def value(present: numpy.ndarray) -> numpy.ndarray:
        return present @ weights + 0.7

    numpy.testing.assert_allclose(shapley_values(value, 7, 3, seed=0), weights, atol=1e-9)
    # LIME's fit is a ridge regression, which shrinks a little.
    numpy.testing.assert_allclose(lime_weights(value, 7, 500, seed=0), weights, atol=0.15)


def test_shapley_values_share_an_interaction_evenly() -> None:
    def value(present: numpy.ndarray) -> numpy.ndarray:
        return 4.0 * present[:, 0] * present[:, 1]

    numpy.testing.assert_allclose(shapley_values(value, 3, 4, seed=1), [2.0, 2.0, 0.0], atol=1e-9)


def test_the_smooth_twin_answers_like_the_quantized_model_and_passes_gradients(
    quantized_reader: Reader, texts: list[str]
) -> None:
    twin = quantized_reader.smooth
    assert any(isinstance(part, SmoothLinear) for part in twin.modules())
    _, readings, _ = read_all(quantized_reader, texts[:30])
    rows = [reading.input_ids for reading in readings]
    exact, smooth = (
        softmax(predict_logits(model, rows, quantized_reader.pad_id).numpy())
        for model in (quantized_reader.model, twin)
    )
    assert 0.0 < numpy.abs(exact - smooth).max() < 0.05
    assert (exact.argmax(axis=1) == smooth.argmax(axis=1)).mean() > 0.95


def test_a_float_model_is_its_own_twin(reader: Reader) -> None:
    assert smooth_twin(reader.model) is reader.model

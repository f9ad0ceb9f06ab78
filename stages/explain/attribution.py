"""How much each word speaks for an answer, by three methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.metrics import Array
from stages.core.params import ExplainParams
from stages.core.tensors import pad_tensors
from stages.explain.reader import Reader, Reading, ids_with, sum_by_word

_TEXTS_AT_ONCE = 16
_ROWS_AT_ONCE = 128
_TINY_DIFFERENCE = 1.0

Value = Callable[[Array], Array]
"""Log-odds of an answer, [variants], with the words marked in [variants, words]."""


@dataclass(frozen=True)
class Integrated:
    """Integrated gradients of several texts."""

    words: list[Array]
    """Share of each word in `differences`, in nats."""
    differences: Array
    """Log-odds of the answer to the text, less those to the text with every word masked; of the smooth model, [n]."""
    errors: Array
    """How far the shares miss the difference when added up, over the difference; over one nat where that is more."""
    steps: Array
    """Steps taken, [n]."""


def integrated_gradients(
    reader: Reader, readings: Sequence[Reading], answers: Sequence[int], params: ExplainParams
) -> Integrated:
    """Integrate the gradient of an answer's log-odds from every word masked to the text (1703.01365).

    Steps double for the texts whose shares do not add up to the difference within `params.completeness`, at most to
    `params.most_steps`; the errors left are reported, not hidden.
    """
    words: list[Array] = [numpy.zeros(0)] * len(readings)
    differences, errors = numpy.zeros(len(readings)), numpy.full(len(readings), numpy.inf)
    steps = numpy.zeros(len(readings), dtype=int)
    pending, tried = list(range(len(readings))), params.steps
    while pending and tried <= params.most_steps:
        for batch in length_batches([len(readings[i].input_ids) for i in pending], _TEXTS_AT_ONCE):
            chosen = [pending[i] for i in batch]
            shares, found = _integrate(reader, [readings[i] for i in chosen], [answers[i] for i in chosen], tried)
            for row, index in enumerate(chosen):
                words[index] = sum_by_word(readings[index], shares[row])
                differences[index], steps[index] = found[row], tried
                missed = abs(shares[row].sum() - found[row])
                errors[index] = missed / max(abs(found[row]), _TINY_DIFFERENCE)
        pending = [index for index in pending if errors[index] > params.completeness]
        tried *= 2
    return Integrated(words, differences, errors, steps)


def shapley_values(value: Value, words: int, rounds: int, seed: int) -> Array:
    """Shapley values of words, [words], by permutation sampling (1705.07874).

    They add up exactly to the value with all words less that with none.

    Args:
        value: of coalitions of words.
        words: how many there are.
        rounds: orders drawn; each is walked there and back.
        seed: of the draw.
    """
    import shap  # takes seconds

    def keep(present: Array, text: Array) -> Array:
        coalition: Array = present.astype(float)[None]
        return coalition

    explainer = shap.PermutationExplainer(value, keep, seed=seed)
    asked = rounds * (2 * words + 1)
    found: Array = explainer(numpy.ones((1, words)), max_evals=asked, silent=True).values[0]
    return found


def lime_weights(value: Value, words: int, samples: int, seed: int) -> Array:
    """Weights of a local linear model of the value, [words] (LIME, 1602.04938).

    LIME cuts words out of a text. It is given one whose words are numbers, so that what is left of it says which words
    of the real text are there, whatever these look like.
    """
    from lime.lime_text import LimeTextExplainer

    def ask(numbered: list[str]) -> Array:
        present = numpy.zeros((len(numbered), words))
        for row, text in enumerate(numbered):
            present[row, [int(number) for number in text.split()]] = 1.0
        odds = value(present)
        return numpy.stack([-odds, odds], axis=1)

    explainer = LimeTextExplainer(split_expression=r"\s+", feature_selection="none", random_state=seed)
    text = " ".join(str(index) for index in range(words))
    explanation = explainer.explain_instance(text, ask, labels=(1,), num_features=words, num_samples=samples)
    weights = numpy.zeros(words)
    for place, weight in explanation.as_map()[1]:
        weights[place] = weight
    return weights


def _integrate(reader: Reader, readings: Sequence[Reading], answers: Sequence[int], steps: int) -> tuple[Array, Array]:
    """Shares of tokens [n, length] and the differences that they divide, [n], in float64."""
    nothing = [
        ids_with(reading, numpy.zeros(reading.count_words(), dtype=bool), reader.absent_id) for reading in readings
    ]
    texts = pad_tensors([reading.input_ids for reading in readings], reader.pad_id)
    starts = pad_tensors(nothing, reader.pad_id)
    target, there = torch.tensor(answers), texts["attention_mask"]
    odds = _odds_of(reader.smooth)
    with torch.no_grad():
        differences = odds(texts["input_ids"], there, target) - odds(starts["input_ids"], there, target)
    model: Any = reader.smooth
    # Positions and segments are the same at both ends, and so are special tokens: words share the whole difference.
    shares = LayerIntegratedGradients(odds, model.get_input_embeddings()).attribute(
        texts["input_ids"],
        baselines=starts["input_ids"],
        additional_forward_args=(there, target),
        n_steps=steps,
        internal_batch_size=_ROWS_AT_ONCE,
    )
    return shares.sum(dim=-1).double().numpy(), differences.double().numpy()


def _odds_of(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def odds(input_ids: Tensor, attention_mask: Tensor, answers: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        own = logits.gather(1, answers[:, None])[:, 0]
        others = logits.scatter(1, answers[:, None], -torch.inf).logsumexp(dim=1)
        return own - others  # type: ignore[no-any-return]

    return odds

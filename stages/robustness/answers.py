"""What a model answers to many groups of texts, each different text asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from scipy.special import logsumexp

from stages.core.cascade import CascadeModel, Exported, models_of, open_exported, predict_exported
from stages.core.metrics import Array, softmax
from stages.core.runtimes import REFERENCE_RUNTIME, open_runtime, prepare, raw_logits

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Answers:
    """Of one model to the texts of a group, in their order."""

    labels: Array
    """Class indices, int64 [texts]."""
    confidence: Array
    """Largest probability, [texts]."""
    energy: Array | None
    """-logsumexp of the logits, [texts]; None of a cascade, whose two models have energies of their own."""

    def select(self, places: Array) -> Answers:
        """Take some of the answers, or some of them several times."""
        energy = None if self.energy is None else self.energy[places]
        return Answers(self.labels[places], self.confidence[places], energy)


def answer_groups(model: Exported, groups: Mapping[str, Sequence[str]]) -> dict[str, Answers]:
    """Answer the texts of every group.

    Texts that are the same tokens to the model, as all cases are to one that reads small letters only, are asked once.
    """
    texts = [text for group in groups.values() for text in group]
    keys = list(zip(*([tuple(row) for row in part.encode(texts)] for part in models_of(model)), strict=True))
    first = dict(zip(reversed(keys), reversed(texts), strict=True))
    place = {key: number for number, key in enumerate(first)}
    answers = _answer(model, list(first.values()))
    places = numpy.array([place[key] for key in keys], dtype=numpy.int64)
    ends = numpy.cumsum([len(group) for group in groups.values()])
    parts = numpy.split(places, ends[:-1])
    return {name: answers.select(part) for name, part in zip(groups, parts, strict=True)}


def _answer(model: Exported, texts: Sequence[str]) -> Answers:
    if isinstance(model, CascadeModel):
        runtime = open_exported(REFERENCE_RUNTIME, model, goal="throughput")
        labels, probabilities = predict_exported(model, runtime, texts, _BATCH_SIZE)
        return Answers(labels, probabilities.max(axis=1), None)
    single = open_runtime(REFERENCE_RUNTIME, model, goal="throughput")
    logits = raw_logits(model, single, prepare(model, texts, _BATCH_SIZE))
    return Answers(logits.argmax(axis=1), softmax(logits).max(axis=1), -logsumexp(logits, axis=1))

"""All texts that a model is asked, in groups: clean, perturbed, from other domains, foreign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import pandas

from stages.core.examples import Examples, sample
from stages.core.metrics import Array
from stages.core.params import Perturbation, RobustnessParams
from stages.robustness.answers import Answers
from stages.robustness.perturb import Material, perturb

TEST, CORPUS = "test", "corpus"
"""Names of groups; no other domain may be called so."""


@dataclass(frozen=True)
class Domain:
    """Labelled texts of the task from elsewhere."""

    texts: list[str]
    labels: Array
    """Class indices, int64 [texts]."""


@dataclass(frozen=True)
class Texts:
    """All that a model is asked."""

    test: Examples
    perturbed: dict[Perturbation, list[list[str]]]
    """Copies of the test texts, [copies][texts], by perturbation."""
    shifted: dict[str, Domain]
    """By name."""
    corpus: list[str]

    def groups(self) -> dict[str, list[str]]:
        """Every text, by the name of its group."""
        copies = {f"{name}/{n}": texts for name, several in self.perturbed.items() for n, texts in enumerate(several)}
        elsewhere = {name: domain.texts for name, domain in self.shifted.items()}
        return {TEST: self.test.texts, **copies, **elsewhere, CORPUS: self.corpus}

    def of_copies(self, name: Perturbation, answers: Mapping[str, Answers]) -> Array:
        """Answers to the copies of a perturbation, [copies, texts]."""
        return numpy.stack([answers[f"{name}/{n}"].labels for n in range(len(self.perturbed[name]))])

    def changed(self, name: Perturbation) -> float:
        """Share of the copies that differ from their text."""
        differs = [
            text != copy for copies in self.perturbed[name] for text, copy in zip(self.test.texts, copies, strict=True)
        ]
        return sum(differs) / len(differs)


def gather(
    test: Examples,
    elsewhere: pandas.DataFrame,
    corpus: Sequence[str],
    synonyms: Mapping[str, Sequence[str]],
    names: Sequence[str],
    params: RobustnessParams,
    seed: int,
) -> Texts:
    """Draw the texts and perturb the task's own.

    Args:
        test: the test split.
        elsewhere: domain, text and label of other domains.
        corpus: unlabelled texts.
        synonyms: by word.
        names: of the classes.
        params: how many, and how strongly changed.
        seed: of all chance.
    """
    own = sample(test, params.texts or len(test), seed)
    material = Material(synonyms, params.neutral_sentences)
    perturbed = {
        name: [
            [perturb(name, text, strength, material, seed, copy) for text in own.texts] for copy in range(params.copies)
        ]
        for name, strength in params.strengths().items()
    }
    shifted = {}
    for name, frame in elsewhere.groupby("domain", sort=False):
        places = _drawn(len(frame), params.shifted_texts or len(frame), seed)
        part = frame.iloc[places]
        labels = numpy.array([names.index(label) for label in part["label"]], dtype=numpy.int64)
        shifted[str(name)] = Domain(part["text"].tolist(), labels)
    return Texts(own, perturbed, shifted, [corpus[place] for place in _drawn(len(corpus), params.foreign_texts, seed)])


def _drawn(available: int, wanted: int, seed: int) -> list[int]:
    chosen: list[int] = numpy.random.default_rng(seed).permutation(available)[:wanted].tolist()
    return sorted(chosen)

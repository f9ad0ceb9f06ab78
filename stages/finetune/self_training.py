"""Self-training: the model labels texts of the corpus, and one that starts anew learns from them too.

The teacher answers without dropout and the student learns with it, as in Noisy Student (1911.04252); for texts Du et
al. (2010.02194). Labels that are balanced over the classes keep the student from the teacher's favourite answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from stages.core.encoding import encode, read_tokenizer
from stages.core.examples import Examples, load_dataset, load_maximum_length
from stages.core.judging import predict_logits
from stages.core.params import Precision, SelfTrainingParams
from stages.core.texts import comparable
from stages.core.training.precision import autocast
from stages.core.training.recipe import Position
from stages.finetune.repeats import joined


@dataclass(frozen=True)
class Learned:
    """A model that learned, and how well."""

    model: nn.Module
    position: Position
    trained_parameters: int
    training_texts: int
    """Copies and pseudo-labelled ones included."""
    quality: float
    """By the task's metric, on validation."""
    self_training: dict[str, Any] | None = None
    """What each round took and gave."""

    @property
    def score(self) -> float:
        """Of the best epoch on validation, ties broken by the loss."""
        return -math.inf if self.position.best_score is None else self.position.best_score


@dataclass(frozen=True)
class Pool:
    """Texts of the corpus that may become labelled ones."""

    examples: Examples
    pad_id: int
    precision: Precision


def load_pool(
    corpus: Path, data: Path, known: Examples, pad_id: int, params: SelfTrainingParams, precision: Precision, seed: int
) -> Pool:
    """Draw candidates from the corpus.

    Args:
        corpus: folder with `corpus.parquet`.
        data: tokenized splits.
        known: labelled texts, of which no copy is a candidate.
        pad_id: token id that fills short texts.
        params: which texts, and how many.
        precision: in which they are labelled.
        seed: of the draw.
    """
    wanted, own = re.compile(params.pattern), {comparable(text) for text in known.texts}
    texts = [text for text in load_dataset(corpus / "corpus.parquet")["text"] if wanted.search(text)]
    order = numpy.random.default_rng(seed).permutation(len(texts)).tolist()
    chosen: dict[str, str] = {}
    for index in order:
        if len(chosen) == params.candidates:
            break
        key = comparable(texts[index])
        if key not in own:
            chosen.setdefault(key, texts[index])
    drawn = list(chosen.values())
    rows = encode(read_tokenizer(data / "tokenizer", load_maximum_length(data)), drawn)
    return Pool(Examples(drawn, rows, numpy.full(len(drawn), -1)), pad_id, precision)


def pseudo_labelled(model: nn.Module, pool: Pool, params: SelfTrainingParams) -> Examples:
    """Label the candidates that the model is sure of, at most so many of every class, the surest first."""
    if not len(pool.examples):
        return pool.examples
    with autocast(pool.precision):
        logits = predict_logits(model, pool.examples.input_ids, pool.pad_id)
    confidence, labels = (part.numpy() for part in torch.softmax(logits, dim=-1).max(dim=-1))
    taken = surest(confidence, labels, logits.shape[1], params)
    chosen = pool.examples.select(taken)
    return Examples(chosen.texts, chosen.input_ids, labels[taken].astype(numpy.int64))


def surest(confidence: numpy.ndarray, labels: numpy.ndarray, classes: int, params: SelfTrainingParams) -> list[int]:
    """Choose texts by their confidence, [n], and label, [n]; ascending indices."""
    taken: list[int] = []
    for label in range(classes):
        sure = numpy.flatnonzero((labels == label) & (confidence >= params.confidence))
        order = numpy.argsort(-confidence[sure], kind="stable")
        taken += sure[order][: params.texts // classes].tolist()
    return sorted(taken)


def self_train(
    first: Learned,
    examples: Examples,
    pool: Pool,
    params: SelfTrainingParams,
    fit: Callable[[str, Examples], Learned],
) -> tuple[Learned, dict[str, Any]]:
    """Train again and again on labels and the best model's own; keep the best by validation.

    Args:
        first: what the labels alone gave.
        examples: labelled.
        pool: candidates.
        params: how many rounds, and what is sure enough.
        fit: trains from the pretrained checkpoint, given a name of the round and the examples.

    Returns:
        the best, and what each round took and gave; a round that finds nothing to take is the last.
    """
    best, kept = first, 0
    rounds: dict[str, dict[str, float]] = {"0": {"taken": 0, "validation": first.quality}}
    for index in range(1, params.rounds + 1):
        more = pseudo_labelled(best.model, pool, params)
        rounds[str(index)] = {"taken": len(more)}
        if not len(more):
            break
        found = fit(f"round{index}", joined(examples, more))
        rounds[str(index)]["validation"] = found.quality
        if found.score > best.score:
            best, kept = found, index
    return best, {"candidates": len(pool.examples), "kept_round": kept, "rounds": rounds}

"""Denoising (BART, 1910.13461, section 2.2): text infilling and sentence permutation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from stages.core.params import DenoisingObjective
from stages.core.tensors import pad_tensors
from stages.core.training.recipe import Tensors
from stages.pretrain.model import require_tokens
from stages.pretrain.objectives.sequence_pairs import SequencePairs


class Denoising(SequencePairs):
    """The decoder writes the whole block from one whose spans are masked and whose texts stand in another order."""

    def __init__(self, params: DenoisingObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "mask", "pad", "eos" if tokenizer.sep_token_id is None else "sep")
        super().__init__(checkpoint, tokenizer, len(tokenizer), length, params.kind)
        self._params, self._mask, self._pad = params, tokenizer.mask_token_id, tokenizer.pad_token_id
        self._separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Break the blocks; the token that begins each stays where it is."""
        chance = numpy.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        rows = [[int(row[0]), *self._broken(row[1:], chance)] for row in blocks.numpy()]
        return {**pad_tensors(rows, self._pad), "targets": blocks}

    def _broken(self, row: numpy.ndarray, chance: numpy.random.Generator) -> list[int]:
        params = self._params
        shuffled = permute_sentences(row, self._separator, chance) if params.permute_sentences else row
        return infill(shuffled, params.noise_density, params.mean_span_length, self._mask, chance)


def permute_sentences(row: numpy.ndarray, separator: int, chance: numpy.random.Generator) -> numpy.ndarray:
    """Put the texts of a block in a random order, each with the separator behind it; the last may be cut off."""
    sentences = numpy.split(row, numpy.flatnonzero(row[:-1] == separator) + 1)
    return numpy.concatenate([sentences[index] for index in chance.permutation(len(sentences))])


def infill(
    row: numpy.ndarray, density: float, mean_span: float, mask: int, chance: numpy.random.Generator
) -> list[int]:
    """Replace spans of tokens by one mask each; a span of no tokens puts in a mask where nothing was.

    Args:
        row: token ids.
        density: share of the tokens taken out, rounded.
        mean_span: of the Poisson distribution that the lengths follow; the last span is cut to fit.
        mask: id of the mask token.
        chance: source of chance.
    """
    spans = span_lengths(round(len(row) * density), mean_span, chance)
    kept = len(row) - sum(spans)
    spans = spans[: kept + 1]  # spans stand apart, so there are no more than gaps between the tokens that stay
    kept = len(row) - sum(spans)
    gaps = numpy.sort(chance.choice(kept + 1, size=len(spans), replace=False))
    made: list[int] = []
    taken = before = 0
    for gap, length in zip(gaps.tolist(), spans, strict=True):
        made += [*row[before + taken : gap + taken].tolist(), mask]
        before, taken = gap, taken + length
    return [*made, *row[before + taken :].tolist()]


def span_lengths(budget: int, mean: float, chance: numpy.random.Generator) -> list[int]:
    """Draw lengths from a Poisson distribution until they add up to the budget."""
    lengths: list[int] = []
    while (rest := budget - sum(lengths)) > 0:
        lengths.append(min(int(chance.poisson(mean)), rest))
    return lengths

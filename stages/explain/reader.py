"""A model asked about whole words: any of them may be absent."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as InTurn
from torch import nn

from stages.core.checkpoints import load_model, load_tokenizer
from stages.core.encoding import read_tokenizer
from stages.core.examples import load_maximum_length, load_pad_id
from stages.core.judging import predict_logits
from stages.core.metrics import Array
from stages.explain.smooth import smooth_twin

NO_WORD = -1
# Scripts without spaces are explained character by character.
_SPLITTER: PreTokenizer = InTurn([Split(Regex(r"[\p{Han}\p{Hiragana}\p{Katakana}]"), "isolated"), BertPreTokenizer()])

Span = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """A text as one model sees it."""

    input_ids: list[int]
    owners: list[int]
    """Word of each token, `NO_WORD` for special tokens."""

    def count_words(self) -> int:
        """Count the words; each owns a token."""
        return max(self.owners, default=NO_WORD) + 1


@dataclass(frozen=True)
class Reader:
    """A model with what it takes to show it words."""

    model: nn.Module
    """As it answers, rounding and all."""
    smooth: nn.Module
    """What gradients are taken of; the same module where nothing is rounded."""
    tokenizer: Tokenizer
    pad_id: int
    absent_id: int
    """Token that stands where a word is absent."""

    @classmethod
    def load(cls, checkpoint: Path, data: Path) -> Reader:
        """Load a checkpoint to explain. A vocabulary without a mask token shows absence by padding that counts."""
        model = load_model(checkpoint).requires_grad_(False)
        pad_id = load_pad_id(data, checkpoint)
        mask_id = load_tokenizer(checkpoint).mask_token_id
        tokenizer = read_tokenizer(checkpoint, load_maximum_length(data))
        return cls(model, smooth_twin(model), tokenizer, pad_id, pad_id if mask_id is None else int(mask_id))


def split_words(text: str) -> list[Span]:
    """Find the words and punctuation marks of a text, as ranges of characters."""
    return [span for _, span in _SPLITTER.pre_tokenize_str(text)]


def read_together(text: str, readers: Sequence[Reader]) -> tuple[list[str], list[Reading]]:
    """Read a text with several models in terms of the same words.

    Returns:
        the words that every model sees, those cut off at the end left out; and a reading for each model.
    """
    spans = split_words(text)
    encodings = [reader.tokenizer.encode(text) for reader in readers]
    owners = [
        [_owner(offsets, spans) if not special else NO_WORD for offsets, special in zip(*columns, strict=True)]
        for columns in ((encoding.offsets, encoding.special_tokens_mask) for encoding in encodings)
    ]
    seen = sorted(set.intersection(*({owner for owner in row if owner != NO_WORD} for row in owners)))
    place = {word: index for index, word in enumerate(seen)}
    readings = [
        Reading(list(encoding.ids), [place.get(owner, NO_WORD) for owner in row])
        for encoding, row in zip(encodings, owners, strict=True)
    ]
    return [text[slice(*spans[word])] for word in seen], readings


def ids_with(reading: Reading, present: Array, absent_id: int) -> list[int]:
    """Token ids of a text where only the words marked in `present`, bool [words], are there."""
    return [
        token if owner == NO_WORD or present[owner] else absent_id
        for token, owner in zip(reading.input_ids, reading.owners, strict=True)
    ]


def sum_by_word(reading: Reading, values: Array) -> Array:
    """Add up the values of tokens, [at least tokens], over each word, [words]."""
    owners = numpy.array(reading.owners)
    own = owners != NO_WORD
    sums: Array = numpy.bincount(owners[own], weights=values[: len(owners)][own], minlength=reading.count_words())
    return sums


def log_odds(logits: Array, answers: Array) -> Array:
    """Log-odds of an answer each, [n], from logits [n, classes]."""
    rows = numpy.arange(len(logits))
    others = logits.astype(float).copy()
    others[rows, answers] = -numpy.inf
    highest = others.max(axis=1)
    result: Array = logits[rows, answers] - highest - numpy.log(numpy.exp(others - highest[:, None]).sum(axis=1))
    return result


def probability(odds: Array) -> Array:
    """Probability from log-odds."""
    result: Array = 1.0 / (1.0 + numpy.exp(-odds))
    return result


def odds_when_absent(
    reader: Reader, readings: Sequence[Reading], answers: Sequence[int], present: Sequence[Array]
) -> list[Array]:
    """Ask the model about variants of texts with words left out; equal variants are asked once.

    Args:
        reader: the model.
        readings: of the texts.
        answers: class explained, one a text.
        present: for each text which words are there, bool [variants, words].

    Returns:
        log-odds of the text's answer, [variants] for each text.
    """
    rows = [
        [tuple(ids_with(reading, variant, reader.absent_id)) for variant in variants]
        for reading, variants in zip(readings, present, strict=True)
    ]
    different = list(dict.fromkeys(row for variants in rows for row in variants))
    place = {row: index for index, row in enumerate(different)}
    logits = predict_logits(reader.model, different, reader.pad_id).numpy()
    found = []
    for variants, answer in zip(rows, answers, strict=True):
        chosen = logits[[place[row] for row in variants]]
        found.append(log_odds(chosen, numpy.full(len(chosen), answer)))
    return found


def _owner(offsets: Span, spans: Sequence[Span]) -> int:
    """Word that holds the last character of a token; some tokenizers count the space before a word to its token."""
    last = offsets[1] - 1
    word = bisect_right([start for start, _ in spans], last) - 1
    return word if word >= 0 and offsets[1] > offsets[0] and last < spans[word][1] else NO_WORD

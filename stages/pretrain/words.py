"""Which tokens start a word, read from the tokenizer itself once per vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stages.core.errors import UserError

_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ")  # space, line feed and tab, as byte-level BPE writes them
_METASPACE = "▁"


def word_starts(tokenizer: Any, vocabulary: int) -> Tensor:
    """Tell for every token whether a word starts with it; a special token is a word of its own.

    Args:
        tokenizer: WordPiece marks what continues a word, byte-level BPE and Unigram what follows a space.
        vocabulary: number of ids; those that the tokenizer lacks start a word.

    Returns:
        bool [vocabulary].

    Raises:
        UserError: if the tokenizer marks neither.
    """
    starts = torch.ones(vocabulary, dtype=torch.bool)
    opens = _opener(tokenizer)
    added = tokenizer.get_added_vocab()
    for token, index in tokenizer.get_vocab().items():
        starts[index] = token in added or opens(token)
    return starts


def _opener(tokenizer: Any) -> Any:
    """The rule by which a token of this kind of vocabulary opens a word."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    continuing = parts["model"].get("continuing_subword_prefix")
    if parts["model"]["type"] == "WordPiece" and continuing:
        return lambda token: not token.startswith(continuing)
    around = list(_parts_of([parts["pre_tokenizer"], parts["decoder"], parts["normalizer"]]))
    if any(part.get("type") == "ByteLevel" for part in around):
        return lambda token: token.startswith(_BYTE_LEVEL_SPACES)
    if any(part.get("type") == "Metaspace" or part.get("content") == _METASPACE for part in around):
        return lambda token: token.startswith(_METASPACE)
    raise UserError(
        "params.yaml: pretrain.objective.whole_words: the tokenizer marks neither spaces nor what continues a word; "
        "set it to false"
    )


def _parts_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in nested JSON."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _parts_of(inner)


def words_of(input_ids: Tensor, starts: Tensor, special: Tensor) -> Tensor:
    """Number the words of each block from 0; what follows a special token starts a word.

    Args:
        input_ids: [blocks, length].
        starts: whether a token starts a word, bool [vocabulary].
        special: ids of special tokens, [k].

    Returns:
        int64 [blocks, length].
    """
    alone = torch.isin(input_ids, special)
    opening = starts[input_ids] | alone
    opening[:, 1:] |= alone[:, :-1]
    opening[:, 0] = True
    return opening.long().cumsum(dim=1) - 1

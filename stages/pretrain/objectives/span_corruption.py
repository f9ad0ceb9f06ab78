"""Span corruption (T5, 1910.10683, section 3.1.4 and the segments of `random_spans_noise_mask` in its code)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.errors import UserError
from stages.core.params import SpanCorruptionObjective
from stages.core.training.recipe import Tensors
from stages.pretrain.model import require_tokens
from stages.pretrain.objectives.sequence_pairs import SequencePairs

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


class SpanCorruption(SequencePairs):
    """Spans are replaced by sentinels; the decoder writes each sentinel and what stood there."""

    def __init__(self, params: SpanCorruptionObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "pad")
        # The token that begins a block says nothing and is left out.
        self._noise, spans = corruption_lengths(length - 1, params.noise_density, params.mean_span_length)
        self._sentinels = sentinel_ids(tokenizer, spans)
        self._end = end_id(tokenizer)
        vocabulary = max(len(tokenizer), int(self._sentinels.max()) + 1)
        super().__init__(checkpoint, tokenizer, vocabulary, length, params.kind)

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Take spans out of the blocks."""
        text = blocks[:, 1:]
        noise = noise_spans(len(text), text.shape[1], self._noise, len(self._sentinels), generator)
        inputs, targets = corrupt(text, noise, self._sentinels, self._end)
        return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "targets": targets}


def corruption_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Work out how many of so many tokens are noise, and in how many spans: the same for every row.

    Inputs are then `length - noise + spans + 1` long and targets `noise + spans + 1`, the end tokens included.
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    return noise, spans


def noise_spans(rows: int, length: int, noise: int, spans: int, generator: torch.Generator) -> Tensor:
    """Draw which tokens are noise: the text is cut at random into as many spans of text as of noise, in turn.

    Returns:
        bool [rows, length]; every row begins with text, ends with noise, and has exactly `noise` tokens of it in
        exactly `spans` spans.
    """
    kept, taken = (_segments(rows, total, spans, generator) for total in (length - noise, noise))
    ends = torch.stack([kept, taken], dim=2).flatten(1).cumsum(dim=1)
    return torch.searchsorted(ends, torch.arange(length).expand(rows, length).contiguous(), right=True) % 2 == 1


def _segments(rows: int, total: int, count: int, generator: torch.Generator) -> Tensor:
    """Cut `total` into `count` lengths of at least 1, every way to cut it as likely as the others: [rows, count]."""
    cuts = torch.rand(rows, total - 1, generator=generator).argsort(dim=1)[:, : count - 1].sort(dim=1).values + 1
    ends = torch.cat([torch.zeros(rows, 1), cuts, torch.full((rows, 1), total)], dim=1).long()
    return ends.diff(dim=1)


def corrupt(text: Tensor, noise: Tensor, sentinels: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Make input and target of each row.

    Args:
        text: ids, [rows, length].
        noise: from `noise_spans`.
        sentinels: id of each span's sentinel, [spans].
        end: id that ends both.

    Returns:
        the text with a sentinel for every span, and every sentinel followed by its span.
    """
    return _with_sentinels(text, noise, sentinels, end), _with_sentinels(text, ~noise, sentinels, end)


def _with_sentinels(text: Tensor, hidden: Tensor, sentinels: Tensor, end: int) -> Tensor:
    """Replace each run of hidden tokens by the next sentinel."""
    first = hidden.clone()
    first[:, 1:] &= ~hidden[:, :-1]
    which = (first.long().cumsum(dim=1) - 1).clamp(min=0)
    shown = torch.where(first, sentinels[which], text)[first | ~hidden].view(len(text), -1)
    return torch.cat([shown, torch.full((len(text), 1), end)], dim=1)


def sentinel_ids(tokenizer: Any, count: int) -> Tensor:
    """Ids of the sentinels in order: the tokenizer's own as T5 names them, or new ones behind its vocabulary.

    Raises:
        UserError: if the tokenizer has some, but too few.
    """
    own = {
        int(found[1]): index for token, index in tokenizer.get_vocab().items() if (found := _SENTINEL.fullmatch(token))
    }
    if not own:
        return torch.arange(len(tokenizer), len(tokenizer) + count)
    if len(own) < count:
        raise UserError(
            f"params.yaml: pretrain.objective: blocks take {count} sentinels and the tokenizer has {len(own)}; "
            "lower noise_density or tokenize.block_length, or raise mean_span_length"
        )
    return torch.tensor([own[number] for number in sorted(own)[:count]])


def end_id(tokenizer: Any) -> int:
    """Id that ends a text.

    Raises:
        UserError: if the tokenizer has none.
    """
    require_tokens(tokenizer, "span_corruption", "eos" if tokenizer.sep_token_id is None else "sep")
    index: int = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return index

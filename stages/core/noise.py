"""More texts like the task's own, made without a model: cut, with words replaced or masked.

Tang et al. (1903.12136, section 3.3) taught small students with such texts: what the teacher says of a broken text
still tells what each word means to it. They are the cheapest transfer data there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from stages.core.errors import UserError
from stages.core.params import NoiseParams


def noised_rows(rows: Sequence[Sequence[int]], params: NoiseParams, tokenizer: Any, seed: int) -> list[list[int]]:
    """Make broken variants of texts that differ from all of them and from each other.

    Args:
        rows: token ids of the texts.
        params: how many variants, and how far from the texts.
        tokenizer: whose special tokens are never touched and never drawn.
        seed: of all chance.

    Raises:
        UserError: if tokens are to be masked and the tokenizer has no mask token.
    """
    if params.mask_probability and tokenizer.mask_token_id is None:
        raise UserError("distill.transfer.noise.mask_probability: the tokenizer has no mask token; set it to 0.0")
    special = set(tokenizer.all_special_ids)
    words = numpy.array([token for row in rows for token in row if token not in special])
    chance = numpy.random.default_rng(seed)
    made: dict[tuple[int, ...], None] = {}
    for _ in range(params.copies):
        made |= {tuple(break_row(row, special, words, tokenizer.mask_token_id, params, chance)): None for row in rows}
    own = {tuple(row) for row in rows}
    return [list(row) for row in made if row not in own]


def break_row(
    row: Sequence[int],
    special: set[int],
    words: numpy.ndarray,
    mask_id: int,
    params: NoiseParams,
    chance: numpy.random.Generator,
) -> list[int]:
    """Cut a text to a part at least half as long, mask some of its tokens and replace others.

    Args:
        row: token ids, special ones included; those before and after the text stay where they are.
        special: ids of special tokens.
        words: ids to draw replacements from, as often as they occur.
        mask_id: id of the mask token.
        params: the three probabilities.
        chance: from which all is drawn.
    """
    inside = [place for place, token in enumerate(row) if token not in special]
    if not inside:
        return list(row)
    before, body, after = row[: inside[0]], row[inside[0] : inside[-1] + 1], row[inside[-1] + 1 :]
    if chance.random() < params.cut_probability:
        length = int(chance.integers((len(body) + 1) // 2, len(body) + 1))
        start = int(chance.integers(0, len(body) - length + 1))
        body = body[start : start + length]
    luck, drawn = chance.random(len(body)), chance.choice(words, len(body))
    broken = [
        token
        if token in special
        else mask_id
        if lot < params.mask_probability
        else int(other)
        if lot < params.mask_probability + params.replace_probability
        else token
        for token, lot, other in zip(body, luck.tolist(), drawn.tolist(), strict=True)
    ]
    return [*before, *broken, *after]

"""Which tokens the model must guess."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.core.params import MaskingParams
from stages.pretrain.words import word_starts, words_of


class Masking:
    """Hides tokens of blocks as the params say."""

    def __init__(self, params: MaskingParams, tokenizer: Any):
        self._params, self._mask_id, self._vocabulary = params, tokenizer.mask_token_id, len(tokenizer)
        self._starts = word_starts(tokenizer, len(tokenizer)) if params.whole_words else None
        self.special = torch.tensor(tokenizer.all_special_ids)

    def hide(self, input_ids: Tensor, progress: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose and hide tokens [blocks, length]; see `mask_tokens` and `mask_rate`."""
        words = None if self._starts is None else words_of(input_ids, self._starts, self.special)
        rate = mask_rate(self._params, progress)
        return mask_tokens(input_ids, self.special, self._mask_id, self._vocabulary, rate, generator, words)


def mask_tokens(
    input_ids: Tensor,
    special: Tensor,
    mask_id: int,
    vocabulary: int,
    probability: float,
    generator: torch.Generator,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens and hide them: 80 % masked, 10 % replaced at random, 10 % kept (1810.04805, section 3.1).

    Args:
        input_ids: [blocks, length].
        special: ids never chosen, [k].
        mask_id: of the mask token.
        vocabulary: number of tokens.
        probability: of a token being chosen.
        generator: source of chance.
        words: number of the word that a token belongs to, [blocks, length], whose tokens are chosen together; None
            chooses every token by itself.

    Returns:
        the ids the model sees, and a boolean tensor of the chosen positions, both [blocks, length].
    """
    chance = torch.rand(input_ids.shape, generator=generator)
    if words is not None:
        chance = chance.gather(1, words)
    chosen = (chance < probability) & ~torch.isin(input_ids, special)
    fate = torch.rand(input_ids.shape, generator=generator)
    others = torch.randint(vocabulary, input_ids.shape, generator=generator)
    seen = torch.where(chosen & (fate < 0.8), torch.full_like(input_ids, mask_id), input_ids)
    seen = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), others, seen)
    return seen, chosen


def mask_rate(params: MaskingParams, progress: float) -> float:
    """Probability of a token being chosen, `progress` of the way (0 to 1) through the run."""
    first, last = params.mask_probability, params.final_mask_probability
    return first if last is None else first + (last - first) * progress

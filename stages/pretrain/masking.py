"""Which tokens the model must guess."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens(
    input_ids: Tensor, special: Tensor, mask_id: int, vocabulary: int, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose tokens and hide them: 80 % masked, 10 % replaced at random, 10 % kept (1810.04805, section 3.1).

    Args:
        input_ids: [blocks, length].
        special: ids never chosen, [k].
        mask_id: of the mask token.
        vocabulary: number of tokens.
        probability: of a token being chosen.
        generator: source of chance.

    Returns:
        the ids the model sees, and a boolean tensor of the chosen positions, both [blocks, length].
    """
    chance = torch.rand(input_ids.shape, generator=generator)
    chosen = (chance < probability) & ~torch.isin(input_ids, special)
    fate = torch.rand(input_ids.shape, generator=generator)
    others = torch.randint(vocabulary, input_ids.shape, generator=generator)
    seen = torch.where(chosen & (fate < 0.8), torch.full_like(input_ids, mask_id), input_ids)
    seen = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), others, seen)
    return seen, chosen

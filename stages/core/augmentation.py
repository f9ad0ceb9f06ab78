"""More texts like the task's own: some tokens guessed anew by the pretrained masked-language model.

TinyBERT (1909.10351, algorithm 1) replaces words one at a time; here all chosen tokens of a copy are masked at once,
so that a copy costs one pass of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor

from stages.core.batches import length_batches
from stages.core.errors import UserError
from stages.core.masked_language import chosen_logits
from stages.core.observe.progress import track
from stages.core.params import AugmentationParams
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 32


def augmented_rows(
    rows: Sequence[Sequence[int]], params: AugmentationParams, language_model: Path, tokenizer: Any, seed: int
) -> list[list[int]]:
    """Make variants of texts that differ from all of them and from each other; see `guessed_copies`."""
    copies = guessed_copies(rows, params, language_model, tokenizer, seed)
    made = {tuple(row): None for copy in copies for row in copy}
    own = {tuple(row) for row in rows}
    return [list(row) for row in made if row not in own]


def guessed_copies(
    rows: Sequence[Sequence[int]], params: AugmentationParams, language_model: Path, tokenizer: Any, seed: int
) -> list[list[list[int]]]:
    """Copy texts with some tokens guessed anew.

    Args:
        rows: token ids of the texts.
        params: how many copies, and how far from the texts.
        language_model: checkpoint folder with a masked-language head.
        tokenizer: whose special tokens are never chosen and never drawn.
        seed: of all chance.

    Returns:
        [copies][rows], each in the order given.
    """
    # Loading draws random numbers where the checkpoint lacks a part.
    try:
        with torch.random.fork_rng(devices=[]):
            model = transformers.AutoModelForMaskedLM.from_pretrained(
                language_model, use_safetensors=True, dtype=torch.float32
            ).eval()
    except ValueError:
        raise UserError(
            f"params.yaml: distill.transfer.augmentation.copies: {language_model} has no masked-language head to guess "
            "tokens with; set it to 0, or pretrain.objective.kind to masked"
        ) from None
    copies = []
    for copy in range(params.copies):
        chances = [numpy.random.default_rng([seed, copy, index]) for index in range(len(rows))]
        copies.append(_one_copy(model, rows, params, tokenizer, chances))
    return copies


def _one_copy(
    model: Any,
    rows: Sequence[Sequence[int]],
    params: AugmentationParams,
    tokenizer: Any,
    chances: Sequence[numpy.random.Generator],
) -> list[list[int]]:
    special = numpy.array(tokenizer.all_special_ids)
    copies: list[list[int]] = [[] for _ in rows]
    for batch in track(length_batches([len(row) for row in rows], _BATCH_SIZE), "guess tokens anew"):
        inputs = pad_tensors([rows[i] for i in batch], tokenizer.pad_token_id)
        ids = inputs["input_ids"]
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        for place, index in enumerate(batch):
            positions = choose_positions(rows[index], special, params.mask_probability, chances[index])
            chosen[place, torch.from_numpy(positions)] = True
        seen = ids.masked_fill(chosen, tokenizer.mask_token_id)
        with torch.inference_mode():
            logits = chosen_logits(model, seen, chosen, attention_mask=inputs["attention_mask"]).float()
        draws = [chances[i].random(int(count)) for i, count in zip(batch, chosen.sum(dim=1), strict=True)]
        ids[chosen] = draw_tokens(logits, special, params.candidates, torch.from_numpy(numpy.concatenate(draws)))
        for place, index in enumerate(batch):
            copies[index] = ids[place, : len(rows[index])].tolist()
    return copies


def choose_positions(
    row: Sequence[int], special: numpy.ndarray, probability: float, chance: numpy.random.Generator
) -> numpy.ndarray:
    """Choose which tokens of a text are guessed anew: each with the probability, at least one, no special token.

    Returns:
        positions, ascending; none where there are only special tokens.
    """
    open_to_choice = numpy.flatnonzero(~numpy.isin(row, special))
    luck = chance.random(len(open_to_choice))
    if not len(luck):
        return open_to_choice
    chosen: numpy.ndarray = open_to_choice[luck <= max(probability, luck.min())]
    return chosen


def draw_tokens(logits: Tensor, special: numpy.ndarray, candidates: int, luck: Tensor) -> Tensor:
    """Draw a token for each position among the likeliest, by their probability.

    Args:
        logits: [positions, vocabulary].
        special: ids never drawn.
        candidates: how many of the likeliest are in the draw.
        luck: evenly distributed in 0 to 1, [positions].

    Returns:
        ids, int64 [positions].
    """
    allowed = logits.index_fill(1, torch.from_numpy(special), -torch.inf)
    best = allowed.topk(min(candidates, logits.shape[1] - len(special)), dim=-1)
    reached = best.values.softmax(dim=-1).cumsum(dim=-1)
    places = (reached < luck[:, None]).sum(dim=-1, keepdim=True).clamp(max=best.indices.shape[1] - 1)
    return best.indices.gather(1, places).squeeze(1)

"""Batches as tensors; apart from `batches`, because a serving process has no torch in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.core.batches import pad, token_batches

_BATCHES_SORTED_TOGETHER = 50


def shuffled_batches(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Cut the indices into random batches of similar length, of at most so many tokens each, padding included.

    Texts are shuffled, sorted by length within runs of some fifty batches, and the batches are shuffled again, so that
    neighbours differ between epochs while little is padded.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    mean = sum(lengths) / max(len(lengths), 1)
    run = max(1, round(_BATCHES_SORTED_TOGETHER * tokens / max(mean, 1.0)))
    batches: list[list[int]] = []
    for start in range(0, len(order), run):
        part = order[start : start + run]
        batches += [[part[i] for i in batch] for batch in token_batches([lengths[i] for i in part], tokens)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad_tensors(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad token ids to the longest row, as the model's keyword arguments."""
    input_ids, attention_mask = pad(rows, pad_id)
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Move a batch to where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}

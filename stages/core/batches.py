"""Texts of unequal length in batches that waste little on padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:  # a serving process has no torch in it, which its measured memory must show
    import torch
from torch import Tensor, nn


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the indices, sorted by length, into batches."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Cut the indices into random batches of similar length.

    Texts are shuffled, sorted by length within runs of fifty batches, and the batches are shuffled again, so that
    neighbours differ between epochs while little is padded.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    run = 50 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), run):
        part = order[start : start + run]
        batches += [[part[i] for i in batch] for batch in length_batches([lengths[i] for i in part], batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pad token ids to `length`, or to the longest row.

    Returns:
        input_ids and attention_mask, int64 [rows, length].
    """
    width = length or max(1, *(len(row) for row in rows), 1)
    input_ids = numpy.full((len(rows), width), pad_id, dtype=numpy.int64)
    attention_mask = numpy.zeros((len(rows), width), dtype=numpy.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask


def pad_tensors(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad token ids to the longest row, as the model's keyword arguments."""
    import torch

    input_ids, attention_mask = pad(rows, pad_id)
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Move a batch to where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}

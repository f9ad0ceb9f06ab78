"""Texts of unequal length in batches that waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the indices, sorted by length, into batches."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def token_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut the indices, sorted by length, into batches of at most so many tokens, padding included.

    Every batch costs about the same, whatever the lengths; a text longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # In order of length the text at hand is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


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

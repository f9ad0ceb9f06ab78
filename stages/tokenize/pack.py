"""Corpus texts packed into blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy


def spread(count: int, wanted: int) -> list[int]:
    """Choose `wanted` of `count` indices, evenly spaced."""
    if wanted >= count:
        return list(range(count))
    return [index * count // wanted for index in range(wanted)]


def pack(rows: Sequence[Sequence[int]], separator: int, begin: int, length: int) -> numpy.ndarray:
    """Join token rows with separators and cut them into blocks.

    Args:
        rows: token ids without special tokens.
        separator: token after each row.
        begin: token that starts each block.
        length: of a block, `begin` included.

    Returns:
        int32 [blocks, length]; a rest shorter than a block is dropped.
    """
    stream = numpy.concatenate([numpy.array([*row, separator], dtype=numpy.int32) for row in rows] or [_EMPTY])
    count = len(stream) // (length - 1)
    body = stream[: count * (length - 1)].reshape(count, length - 1)
    return numpy.concatenate([numpy.full((count, 1), begin, dtype=numpy.int32), body], axis=1)


_EMPTY = numpy.zeros(0, dtype=numpy.int32)


def hold_out(blocks: numpy.ndarray, fraction: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Split blocks [n, length] at random into training and held-out ones; each gets one where there are two."""
    order = numpy.random.default_rng(seed).permutation(len(blocks))
    held = min(max(1, round(fraction * len(blocks))), len(blocks) - 1) if len(blocks) > 1 else 0
    return blocks[order[held:]], blocks[order[:held]]

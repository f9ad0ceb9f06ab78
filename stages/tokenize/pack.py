"""Corpus texts packed into blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from stages.core.packing import PADDED


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


def pack_apart(
    rows: Sequence[Sequence[int]], separator: int, begin: int, pad: int, length: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Put whole documents into blocks, each into the fullest one that has room (best fit, 2404.10830).

    Args:
        rows: token ids without special tokens; a document too long for a block is cut into pieces that fit.
        separator: token after each document.
        begin: token before each document.
        pad: token that fills what is left of a block.
        length: of a block.

    Returns:
        int32 [blocks, length], and for each token the number of its document within the block, -1 where padded.
    """
    room = length - 2
    pieces = [row[start : start + room] for row in rows for start in range(0, len(row), room)]
    bins = _best_fit([len(piece) + 2 for piece in pieces], length)
    blocks = numpy.full((len(bins), length), pad, dtype=numpy.int32)
    documents = numpy.full((len(bins), length), PADDED, dtype=numpy.int32)
    for block, numbers, chosen in zip(blocks, documents, bins, strict=True):
        end = 0
        for number, index in enumerate(chosen):
            start, end = end, end + len(pieces[index]) + 2
            block[start:end] = [begin, *pieces[index], separator]
            numbers[start:end] = number
    return blocks, documents


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items by bin: the largest items first, each into the bin that it leaves least room in."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        left = next((left for left in range(sizes[index], capacity + 1) if with_room[left]), None)
        if left is None:
            left, chosen = capacity, len(bins)
            bins.append([])
        else:
            chosen = with_room[left].pop()
        bins[chosen].append(index)
        with_room[left - sizes[index]].append(chosen)
    return bins


_EMPTY = numpy.zeros(0, dtype=numpy.int32)


def hold_out(blocks: numpy.ndarray, fraction: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Split blocks [n, ...] at random into training and held-out ones; each gets one where there are two."""
    order = numpy.random.default_rng(seed).permutation(len(blocks))
    held = min(max(1, round(fraction * len(blocks))), len(blocks) - 1) if len(blocks) > 1 else 0
    return blocks[order[held:]], blocks[order[:held]]

"""Which parts stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def parts_to_keep(scores: Sequence[Tensor], removed: float, minimum: int, multiple: int) -> list[Tensor]:
    """Choose the parts that stay; layers compete with one another.

    Args:
        scores: of each layer's parts, [parts].
        removed: share of all parts to remove.
        minimum: parts that every layer keeps.
        multiple: layers keep a multiple of so many parts, rounded up, never more than they have.

    Returns:
        for each layer the indices that stay, ascending.
    """
    budget = sum(len(layer) for layer in scores) - math.floor(removed * sum(len(layer) for layer in scores))
    ranked = torch.cat(list(scores)).sort(descending=True, stable=True).indices
    owners = torch.cat([torch.full((len(layer),), index) for index, layer in enumerate(scores)])
    counts = torch.bincount(owners[ranked[:budget]], minlength=len(scores)).tolist()
    kept = []
    for layer, count in zip(scores, counts, strict=True):
        width = min(len(layer), math.ceil(max(count, minimum) / multiple) * multiple)
        best = layer.sort(descending=True, stable=True).indices[:width]
        kept.append(best.sort().values)
    return kept

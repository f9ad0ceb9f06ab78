"""Whole layers that go (Sajjad et al., 2004.03844)."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from stages.core.errors import UserError
from stages.core.structure import encoder_layers, keep_layers


def drop_layers(model: nn.Module, count: int, loss: Callable[[nn.Module], float]) -> list[int]:
    """Keep `count` layers, in place: again and again, the layer goes without which the loss is least.

    Args:
        model: in evaluation mode.
        count: of layers to keep.
        loss: on the user's data, of a model with fewer layers.

    Returns:
        the layers kept, counted from 0.

    Raises:
        UserError: if the model has fewer layers.
    """
    kept = list(range(len(encoder_layers(model))))
    if count > len(kept):
        raise UserError(f"prune.layers: the model has {len(kept)} layers, cannot keep {count}; null keeps all")

    def loss_without(layer: int) -> float:
        shorter = copy.deepcopy(model)
        keep_layers(shorter, [index for index in kept if index != layer])
        return loss(shorter)

    while len(kept) > count:
        kept.remove(min(kept, key=loss_without))
    keep_layers(model, kept)
    return kept

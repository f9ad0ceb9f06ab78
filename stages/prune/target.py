"""Pruning to a measured speedup (after ZipLM, 2302.04089).

The table drives the search, the clock has the last word: the search is repeated with a corrected budget until the
exported model is as fast as asked. That is cheap, because nothing is trained meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from stages.core.errors import UserError
from stages.core.latency import LatencyTable
from stages.core.structure import LayerWidth, encoder_layers, keep_parts, layer_widths
from stages.prune.clock import Clock
from stages.prune.saliency import Order, Saliency
from stages.prune.search import find_parts

TOLERANCE = 0.05
"""Share by which the measured speedup may miss the target before the search is repeated."""
_ATTEMPTS = 4


@dataclass(frozen=True)
class Attempt:
    """One outcome of the search."""

    parts: list[Saliency]
    """Indices of heads and neurons that stay, one entry a layer."""
    predicted: float
    """Speedup by the table."""
    achieved: float
    """Speedup by the clock."""


def cut_to_speedup(
    model: nn.Module,
    whole: Sequence[LayerWidth],
    head_start: float,
    target: float,
    table: LatencyTable,
    gradients: Sequence[Saliency],
    multiple: int,
    order: Order,
    clock: Clock,
) -> list[Attempt]:
    """Remove parts from a model, in place, until it is `target` times as fast as the stage's input.

    Args:
        model: to cut.
        whole: widths of the stage's input.
        head_start: how many times faster than the table says the model is already, its hidden states being narrower.
        target: speedup over it.
        table: of measured times.
        gradients: of every text by the gates of the model, one entry a layer.
        multiple: of feed-forward widths.
        order: of the scores.
        clock: measures speedups.

    Returns:
        what was tried; the one nearest to the target was taken.

    Raises:
        UserError: if the target is out of reach even without heads and neurons.
    """
    whole_seconds, layers = head_start * table.model_seconds(whole), len(gradients)
    least = table.model_seconds([LayerWidth(0, 0)] * layers)
    if whole_seconds / target < least:
        raise _out_of_reach(target, whole_seconds / least)
    attempts: list[Attempt] = []
    budget = whole_seconds / target
    for _ in range(_ATTEMPTS):
        parts = find_parts(gradients, table, budget, multiple, order)
        if parts is None:
            raise RuntimeError("the budget does not hold the rest of the model")
        candidate = copy.deepcopy(model)
        keep(candidate, parts)
        predicted = whole_seconds / table.model_seconds(layer_widths(candidate))
        attempts.append(Attempt(parts, predicted, clock(candidate)))
        miss = attempts[-1].achieved / target
        if abs(miss - 1) <= TOLERANCE:
            break
        if miss < 1 and not any(len(part.heads) + len(part.neurons) for part in parts):
            raise _out_of_reach(target, attempts[-1].achieved)
        budget = max(least, budget * miss)
    keep(model, nearest(attempts, target).parts)
    return attempts


def keep(model: nn.Module, parts: Sequence[Saliency]) -> None:
    """Remove all but the given parts, in place."""
    for layer, kept in zip(encoder_layers(model), parts, strict=True):
        keep_parts(layer, kept.heads, kept.neurons)


def nearest(attempts: Sequence[Attempt], target: float) -> Attempt:
    """The attempt whose measured speedup is nearest to the target, by ratio."""
    return min(attempts, key=lambda attempt: max(attempt.achieved / target, target / attempt.achieved))


def _out_of_reach(target: float, largest: float) -> UserError:
    return UserError(
        f"prune.speedup: {target:g} is out of reach, without any heads and neurons the model is {largest:.2f} times "
        "as fast; ask for less, keep fewer layers (prune.layers), or distill a smaller student"
    )

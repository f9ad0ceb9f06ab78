"""Which heads and neurons stay where the model may take so much time and no more (Kwon et al., 2204.09656).

First the widths: removing parts costs importance and saves measured time, so every block offers its widths at a price,
and the best choice under a budget is a knapsack problem, solved exactly up to the rounding of time. Then the parts:
parts of one block interact, and swapping them by the whole Fisher matrix of the block lowers what is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy
import torch
from torch import Tensor

from stages.core.latency import LatencyTable
from stages.core.structure import LayerWidth
from stages.prune.saliency import Order, Saliency, score

_TICKS = 10_000


@dataclass(frozen=True)
class Option:
    """One width that a block may take."""

    width: int
    loss: float
    """Importance of the parts removed."""
    seconds: float


def find_parts(
    gradients: Sequence[Saliency], table: LatencyTable, budget: float, multiple: int, order: Order
) -> list[Saliency] | None:
    """Choose the parts that stay.

    Args:
        gradients: of every text by the gates, one entry a layer.
        table: of measured times.
        budget: seconds a text that the whole model may take.
        multiple: feed-forward widths are multiples of it, or the width there is.
        order: of the scores.

    Returns:
        for each layer the indices of heads and neurons that stay, ascending; None where even nothing takes too long.
    """
    scores = score(gradients, order)
    options = []
    for layer, share in zip(scores, table.shares(len(scores)), strict=True):
        options.append(block_options(layer.heads, 1, table.attention_seconds, share))
        options.append(block_options(layer.neurons, multiple, table.feed_forward_seconds, share))
    left = budget - table.model_seconds([LayerWidth(0, 0)] * len(scores))
    chosen = least_loss(options, left)
    if chosen is None:
        return None
    return [
        Saliency(
            _best(layer.heads, rows.heads, heads.width, order),
            _best(layer.neurons, rows.neurons, neurons.width, order),
        )
        for layer, rows, heads, neurons in zip(scores, gradients, chosen[::2], chosen[1::2], strict=True)
    ]


def block_options(scores: Tensor, multiple: int, seconds: Callable[[int], float], share: float = 1.0) -> list[Option]:
    """Offer every width of a block, the least important parts removed.

    Args:
        scores: of the parts, [parts].
        multiple: of the widths between none and all.
        seconds: function from width to time.
        share: of that time which the block takes.
    """
    lost = numpy.concatenate([[0.0], numpy.cumsum(numpy.sort(scores.double().numpy()))])
    count = len(scores)
    return [
        Option(width, float(lost[count - width]), share * seconds(width))
        for width in sorted({*range(0, count, multiple), count})
    ]


def least_loss(blocks: Sequence[Sequence[Option]], budget: float, ticks: int = _TICKS) -> list[Option] | None:
    """Choose one option a block such that the times stay within the budget and the losses are least.

    Args:
        blocks: with their options.
        budget: for the sum of the seconds.
        ticks: that the budget is cut into; times are rounded up to whole ticks.

    Returns:
        the options chosen; None where nothing fits.
    """
    if budget < 0:
        return None
    tick = max(budget, 1e-30) / ticks  # a budget of nothing fits only what takes no time
    best = numpy.zeros(ticks + 1)  # least loss of the blocks so far within so many ticks
    choices = []
    for options in blocks:
        # Rounding before rounding up: 3.0000000000000004 ticks are 3.
        costs = [ceil(round(option.seconds / tick, 6)) for option in options]
        table = numpy.full((len(options), ticks + 1), numpy.inf)
        for row, cost, option in zip(table, costs, options, strict=True):
            if cost <= ticks:
                row[cost:] = best[: ticks + 1 - cost] + option.loss
        choices.append((table.argmin(axis=0), costs))
        best = table.min(axis=0)
    if not numpy.isfinite(best[ticks]):
        return None
    chosen, left = [], ticks
    for options, (choice, costs) in zip(reversed(blocks), reversed(choices), strict=True):
        index = int(choice[left])
        chosen.append(options[index])
        left -= costs[index]
    return chosen[::-1]


def rearrange(fisher: Tensor, removed: Tensor) -> Tensor:
    """Go once over the removed parts and swap each for the kept one that lowers the loss most, if any does.

    The loss of removing the parts m is m^T F m with the Fisher matrix F of the block.

    Args:
        fisher: [parts, parts], symmetric.
        removed: bool [parts].

    Returns:
        bool [parts] with as many set; its loss is never larger.
    """
    removed = removed.clone()
    diagonal, pull = fisher.diagonal(), fisher[:, removed].sum(dim=1)
    for out in removed.nonzero().flatten().tolist():
        # m^T F m after swapping `out` for each other part, less that before; parts already removed cannot come in.
        change = diagonal[out] - 2 * pull[out] + 2 * (pull - fisher[:, out]) + diagonal
        change[removed] = 0.0
        into = int(change.argmin())
        if change[into] < 0:
            removed[out], removed[into] = False, True
            pull = pull - fisher[:, out] + fisher[:, into]
    return removed


def _best(scores: Tensor, gradients: Tensor, width: int, order: Order) -> Tensor:
    """Indices of the parts to keep; first-order scores know nothing of how parts interact."""
    kept = scores.sort(descending=True, stable=True).indices[:width]
    removed = torch.ones(len(scores), dtype=torch.bool)
    removed[kept] = False
    if order == "second_order":
        rows = gradients.double()
        removed = rearrange(rows.T @ rows, removed)
    return (~removed).nonzero().flatten()

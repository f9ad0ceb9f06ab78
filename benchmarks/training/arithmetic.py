"""What a training step has to compute, and how fast the machine multiplies matrices of those shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.core.ceilings import measure_products

_PASSES = 3
"""Forward, and backward for the weights and for the inputs; each multiplies as much (2001.08361)."""
_REPEATS = 5


@dataclass(frozen=True)
class Arithmetic:
    """What a masked language model computes."""

    body: int
    """Weights of the matrices that every token passes."""
    head: int
    """Weights of the matrices that only a hidden token has to pass."""
    layers: int
    width: int
    """Of the hidden states."""

    def operations_per_token(self, hidden_share: float, context: float) -> float:
        """Operations that training on a token needs: 6 a weight, and attention.

        A product and a sum are two. Padding, logits where nothing is hidden, and attention to other texts are not
        needed, so that an engine that computes them gets nothing for it.

        Args:
            hidden_share: of the tokens the model must guess.
            context: tokens that a token attends to, on average.
        """
        products = self.body + hidden_share * self.head
        attention = 2 * self.layers * self.width * context  # scores and weighted sum
        return 2.0 * _PASSES * (products + attention)


def count_arithmetic(model: Any) -> Arithmetic:
    """Count the matrices of a masked language model; tables that are only looked up do not count."""
    body = getattr(model, model.base_model_prefix)
    inside = {id(part) for part in body.modules()}
    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return Arithmetic(
        sum(part.weight.numel() for name, part in linears if id(part) in inside and "pooler" not in name),
        sum(part.weight.numel() for _, part in linears if id(part) not in inside),
        model.config.num_hidden_layers,
        model.config.hidden_size,
    )


def mean_context(lengths: Sequence[int]) -> float:
    """Tokens that a token attends to inside its own text, on average over the tokens."""
    return sum(length * length for length in lengths) / sum(lengths)


def product_shapes(model: Any, tokens: int, hidden: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the products of a step, forward: `tokens` rows, or `hidden` ones in the head."""
    body = getattr(model, model.base_model_prefix)
    inside = {id(part) for part in body.modules()}
    return [
        (tokens if id(part) in inside else hidden, part.in_features, part.out_features)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "pooler" not in name
    ]


def measure_ceiling(shapes: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Measure giga-operations a second of bf16 products.

    Returns:
        `square`: of large square matrices, the machine's ceiling; `shapes`: of the products of a step, all three
        passes of each, one after the other and nothing between them.
    """
    seconds = sum(_product_seconds(*shape) for shape in shapes)
    operations = sum(2.0 * _PASSES * rows * inputs * outputs for rows, inputs, outputs in shapes)
    return {"square": measure_products()["bf16"], "shapes": operations / seconds / 1e9}


def _product_seconds(rows: int, inputs: int, outputs: int) -> float:
    """Seconds of the three products of a linear layer, the fastest of some."""
    given = torch.randn(rows, inputs, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    gradient = torch.randn(rows, outputs, dtype=torch.bfloat16)
    return (
        _seconds(lambda: given @ weight.T) + _seconds(lambda: gradient @ weight) + _seconds(lambda: gradient.T @ given)
    )


def _seconds(work: Any) -> float:
    work()
    spent = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return min(spent)

"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.core.params import OptimizerParams


def build_optimizer(model: nn.Module, params: OptimizerParams, scale: Callable[[str], float]) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients.

    One group a parameter, whose `scale` is its share of the learning rate; biases and norms are not decayed, as in
    BERT's own optimizer.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter],
            "scale": scale(name),
            "weight_decay": params.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=params.learning_rate, fused=True)

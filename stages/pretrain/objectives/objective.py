"""What the stage asks of an objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.core.training.recipe import Tensors


class Objective(Protocol):
    """A model and what it learns from packed blocks of text."""

    model: nn.Module
    """Everything that is trained."""
    vocabulary_head: bool
    """Whether the held-out loss is in nats a token, so that a perplexity can be told."""

    least_blocks: int
    """Blocks that a batch must have for the objective to be learned from it."""
    keeps_apart: bool
    """Whether documents of a block may be kept apart: `documents` among the tensors then says which is whose."""

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Make inputs and labels of blocks [blocks, length], a pure function of its arguments.

        Args:
            blocks: token ids, int64.
            progress: how much of the run is over, 0 to 1.
            generator: source of all chance.
        """

    def loss(self, tensors: Tensors) -> Tensor:
        """Mean loss of a batch."""

    def weight(self, tensors: Tensors) -> float:
        """What that mean is over: parts of a batch, so weighted, add up to the whole."""

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Held-out figures of a batch; `heldout_loss` is always among them; the state of chance changes none."""

    def scored(self, blocks: Tensor) -> Tensor | None:
        """Tokens of the text that the held-out loss may fall on, bool [blocks, length]; None: it falls on others."""

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Models to write, by unit; `model` is the one that later stages take."""


def row_share(chosen: Tensor) -> Tensor:
    """Weight of every chosen position in a loss that is a mean over rows.

    With these weights, the mean over a batch's rows of the weighted sum of each row is the mean over the batch's chosen
    positions, and the parts of a batch, each weighing as much as it has rows, add up to that.

    Args:
        chosen: bool [rows, length].

    Returns:
        float32 [rows, length], 0 where nothing is chosen.
    """
    return chosen.float() * (len(chosen) / chosen.sum().clamp(min=1))


def language_figures(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Perplexity of a loss in nats a token, and bits a byte of text where tokens are text."""
    perplexity = {"perplexity": math.exp(min(loss, 50.0))}
    return (
        perplexity if bytes_per_token is None else perplexity | {"bits_per_byte": loss / math.log(2) / bytes_per_token}
    )

"""What a stage tells the training loop, and where a training run stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stages.core.params import OptimizerParams

Batch = Sequence[int]
"""What `Recipe.prepare` needs to know of a batch: mostly the rows of the training set that it holds."""
Tensors = Mapping[str, Tensor]
"""A batch, ready for the loss: the first dimension of every tensor counts the same examples."""


def split(tensors: Tensors, parts: int) -> list[Tensors]:
    """Cut a batch into parts of nearly equal numbers of examples."""
    cut = {name: tensor.tensor_split(parts) for name, tensor in tensors.items()}
    return [dict(zip(cut, part, strict=True)) for part in zip(*cut.values(), strict=True)]


def count_examples(tensors: Tensors) -> float:
    """Count the examples of a batch."""
    return float(len(next(iter(tensors.values()))))


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how it is judged."""

    optimizer: OptimizerParams
    rounds: int
    """Epochs, or parts of a run of steps; each ends with an evaluation."""
    batches: Callable[[int], Sequence[Batch]]
    """Batches of a round; must depend on nothing but the round's number."""
    prepare: Callable[[Batch], Tensors]
    """Tensors of a batch, on the CPU; called ahead of time in another thread, so it must depend on the batch alone."""
    loss: Callable[[Tensors], Tensor]
    """Mean loss of the examples, computed under autocast, from tensors on the model's device."""
    evaluate: Callable[[], tuple[float, dict[str, float]]]
    """A score, larger is better, and the values to add to the curves."""
    weight: Callable[[Tensors], float] = count_examples
    """What the mean of `loss` is over: examples, or tokens with a label. Parts of a batch weigh so much in its loss."""
    patience: int | None = None
    """Stop after so many rounds without a better score; None runs them all."""
    keep_best: bool = True
    """Whether the weights of the best round are kept, or those of the last."""
    learning_rate_scale: Callable[[str], float] = field(default=lambda name: 1.0)
    """Share of the learning rate that a parameter of this name gets."""
    tokens: Collection[int] | None = None
    """Every token id that a batch can hold, where that is known: the embeddings of no others are trained."""
    adversary: Callable[[Callable[[float], float]], float] | None = None
    """Computes the gradients of a batch in its own way and returns the loss; None computes them once, as they are.

    Given a function that adds the gradients of the batch, times a share, and returns the loss times that share.
    """
    after_step: Callable[[int], None] | None = None
    """Called after each step with the number of steps taken; the gradients are still there."""
    divisible: bool = False
    """Whether `loss` calls the model once and looks at its answer alone, so that processes may compute parts of it."""


@dataclass
class Faults:
    """What went wrong so far in a training run, and what came of it; see `faults`."""

    in_a_row: int = 0
    """Bad steps since the last good one."""
    rollbacks: int = 0
    rolled_back_to: int | None = None
    """Step of the last way back, while nothing was learnt since."""
    rate: float = 1.0
    """Share of the learning rate that is left."""
    bad_batches: list[list[int]] = field(default_factory=list)
    """Round and batch of every bad step; passed over when they come again after a way back."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last good steps."""
    first_highest: float = -math.inf
    """The highest loss of the first window."""


@dataclass
class Position:
    """Where a training run stands; what cannot be computed again from the params."""

    round: int = 0
    batch: int = 0
    step: int = 0
    parts: int = 1
    """Into how many micro-batches every batch is cut."""
    processes: dict[str, int] = field(default_factory=dict)
    """Over how many processes the run is spread, by `training.parallel`'s names."""
    seconds: float = 0.0
    """Spent training so far, evaluations left out."""
    loss_sum: float = 0.0
    loss_count: int = 0
    best_score: float | None = None
    best_round: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)

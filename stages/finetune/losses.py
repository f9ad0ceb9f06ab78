"""What a batch costs: the task's loss with its options, two passes of dropout, mixed texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from stages.core.params import BalancedClasses, EffectiveNumber, FinetuneParams
from stages.core.tasks import LossOptions, Task
from stages.core.training.recipe import Tensors
from stages.finetune.mixup import is_mixed, mixed_inputs


def loss_options(params: FinetuneParams, labels: Sequence[int], classes: int) -> LossOptions:
    """Say how the task's loss is computed, with class weights from the labels of the training texts."""
    weights = None if params.class_weights is None else class_weights(params.class_weights, labels, classes)
    return LossOptions(params.label_smoothing, params.focal_gamma, weights)


def class_weights(params: BalancedClasses | EffectiveNumber, labels: Sequence[int], classes: int) -> Tensor:
    """Weigh classes so that rare ones count more and a training text weighs 1 in the mean.

    Balanced: inversely to the number of a class's texts. Effective number (1901.05555, equation 2): inversely to
    (1 - beta^n) / (1 - beta). A class without texts weighs 0.

    Args:
        params: which of the two.
        labels: class indices of the training texts; -1 where there is none.
        classes: how many there are.

    Returns:
        float32 [classes].
    """
    counts = numpy.bincount(numpy.asarray(labels)[numpy.asarray(labels) >= 0], minlength=classes)
    numbers = counts if params.kind == "balanced" else (1.0 - params.beta**counts) / (1.0 - params.beta)
    inverse = numpy.divide(1.0, numbers, out=numpy.zeros(classes), where=counts > 0)
    return torch.tensor(inverse * counts.sum() / (inverse * counts).sum(), dtype=torch.float32)


def batch_loss(model: Any, task: Task, options: LossOptions, r_drop: float, tensors: Tensors) -> Tensor:
    """Mean loss of a batch.

    With `r_drop` the texts go through the model twice, as one batch of twice the size, each half with dropout masks of
    its own; the loss is half of R-Drop's equation 4 (2106.14448), so that it compares with that of a single pass.

    Args:
        model: a classifier of transformers.
        task: for the loss.
        options: of the loss.
        r_drop: weight of the divergence between the two passes; 0.0 for one pass.
        tensors: of the batch, `labels` among them.
    """
    inputs = _inputs(model, tensors)
    if not r_drop:
        return _label_loss(task, options, model(**inputs).logits.float(), tensors)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    first, second = model(**twice).logits.float().chunk(2)
    wrong = _label_loss(task, options, first, tensors) + _label_loss(task, options, second, tensors)
    return 0.5 * wrong + 0.5 * r_drop * symmetric_divergence(first, second)


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Mean of both Kullback-Leibler divergences between two answers to the same texts; logits [texts, classes]."""
    one, other = functional.log_softmax(first, dim=-1), functional.log_softmax(second, dim=-1)
    return 0.5 * ((one.exp() - other.exp()) * (one - other)).sum(dim=-1).mean()


def _inputs(model: Any, tensors: Tensors) -> dict[str, Tensor]:
    if is_mixed(tensors):
        return mixed_inputs(model.get_input_embeddings(), tensors)
    return {name: tensors[name] for name in ("input_ids", "attention_mask")}


def _label_loss(task: Task, options: LossOptions, logits: Tensor, tensors: Tensors) -> Tensor:
    loss = task.loss(logits, tensors["labels"], options)
    if not is_mixed(tensors):
        return loss
    share = tensors["share"][0]
    return share * loss + (1.0 - share) * task.loss(logits, tensors["partner_labels"], options)

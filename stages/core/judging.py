"""Models judged on tokenized examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import logits_of
from stages.core.examples import Examples
from stages.core.tasks import Task
from stages.core.tensors import pad_tensors, to_device

_BATCH_SIZE = 64


def predict_logits(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Run a model over token rows in batches of similar length; logits [n, classes] in the order given."""
    batches = length_batches([len(row) for row in rows], _BATCH_SIZE)
    parts = [
        logits_of(model, to_device(pad_tensors([rows[i] for i in batch], pad_id), model)).cpu() for batch in batches
    ]
    order = torch.tensor([index for batch in batches for index in batch])
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, order, logits)


def judge(model: nn.Module, task: Task, metric: str, examples: Examples, pad_id: int) -> tuple[float, dict[str, float]]:
    """Score a model on the validation split.

    Returns:
        a score, larger is better, whose ties are broken by the loss; and loss, accuracy and the metric for the curves.
    """
    logits = predict_logits(model, examples.input_ids, pad_id)
    loss = float(task.loss(logits, torch.from_numpy(examples.labels)))
    quality = {name: task.score(name, logits, examples.labels) for name in dict.fromkeys(("accuracy", metric))}
    values = {"validation_loss": loss, **{f"validation_{name}": value for name, value in quality.items()}}
    return quality[metric] - 1e-4 * loss, values


def validation_quality(model: nn.Module, task: Task, examples: Examples, pad_id: int) -> dict[str, float]:
    """Measure accuracy and macro F1 on the validation split, as every training stage reports them."""
    logits = predict_logits(model, examples.input_ids, pad_id)
    return {name: task.score(name, logits, examples.labels) for name in ("accuracy", "f1_macro", "f1_weighted")}

"""Command line of the finetune stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.core.checkpoints import count_parameters, extend_lineage, save_model
from stages.core.examples import load_examples, load_labels, load_pad_id
from stages.core.judging import judge, validation_quality
from stages.core.stage import StageRun, command
from stages.core.tasks import get_task
from stages.core.tensors import pad_tensors, shuffled_batches
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors
from stages.finetune.adversarial import build_adversary
from stages.finetune.augmentation import add_copies
from stages.finetune.layers import learning_rate_shares, reinitialize, set_dropout
from stages.finetune.losses import batch_loss, loss_options
from stages.finetune.mixup import with_partners


def run_finetune(run: StageRun) -> dict[str, Any]:
    """Train the task head and the model under it."""
    params, seed, data = run.params.finetune, run.params.seed, run.inputs["data"]
    task, metric = get_task(run.params.task.kind), run.params.quality.metric
    own, validation, pad_id = load_examples(data, "train"), load_examples(data, "validation"), load_pad_id(data)
    examples = add_copies(own, params.augmentation, data, run.inputs["model"], run.inputs.get("lexicon"), seed)
    labels = load_labels(data)
    model: Any = task.build_model(run.inputs["model"], labels)
    reinitialize(model, params.reinitialized_layers)
    set_dropout(model, params.dropout)
    options = loss_options(params, own.labels.tolist(), len(labels))
    lengths = [len(row) for row in examples.input_ids]

    def prepare(batch: Batch) -> Tensors:
        rows = pad_tensors([examples.input_ids[i] for i in batch], pad_id)
        tensors = {**rows, "labels": torch.from_numpy(examples.labels[list(batch)])}
        return with_partners(tensors, params.mixup, (seed, *batch)) if params.mixup else tensors

    def loss(tensors: Tensors) -> Tensor:
        return batch_loss(model, task, options, params.r_drop, tensors)

    recipe = Recipe(
        optimizer=params.optimizer,
        rounds=params.epochs,
        batches=lambda epoch: shuffled_batches(lengths, params.optimizer.batch_tokens, seed * 1000 + epoch),
        prepare=prepare,
        loss=loss,
        evaluate=lambda: judge(model, task, metric, validation, pad_id),
        patience=params.patience,
        learning_rate_scale=learning_rate_shares(
            [name for name, _ in model.named_parameters()], params.layer_decay
        ).__getitem__,
        adversary=build_adversary(model, params.adversarial, pad_id),
    )
    position = train(model, recipe, run, "finetune")
    save_model(model, run.unit("model"), data / "tokenizer", extend_lineage(run.inputs["model"], "finetune"))
    return {
        "parameters": count_parameters(model),
        "training_texts": len(examples),
        "epochs": position.round,
        "best_epoch": position.best_round + 1,
        "validation": validation_quality(model, task, validation, pad_id),
    }


if __name__ == "__main__":
    command("finetune", run_finetune, inputs=("model", "data"), optional=("lexicon",))

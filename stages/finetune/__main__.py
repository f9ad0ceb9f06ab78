"""Command line of the finetune stage."""

from __future__ import annotations

import re
from functools import partial
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
from stages.finetune.adversarial import add_adversarial_gradients


def run_finetune(run: StageRun) -> dict[str, Any]:
    """Train the task head and the model under it."""
    params, seed, data = run.params.finetune, run.params.seed, run.inputs["data"]
    task, metric = get_task(run.params.task.kind), run.params.quality.metric
    examples, validation, pad_id = load_examples(data, "train"), load_examples(data, "validation"), load_pad_id(data)
    model: Any = task.build_model(run.inputs["model"], load_labels(data))
    lengths = [len(row) for row in examples.input_ids]

    def prepare(batch: Batch) -> Tensors:
        labels = torch.from_numpy(examples.labels[list(batch)])
        return {**pad_tensors([examples.input_ids[i] for i in batch], pad_id), "labels": labels}

    def loss(tensors: Tensors) -> Tensor:
        logits = model(tensors["input_ids"], tensors["attention_mask"]).logits
        return task.loss(logits.float(), tensors["labels"], params.label_smoothing)

    recipe = Recipe(
        optimizer=params.optimizer,
        rounds=params.epochs,
        batches=lambda epoch: shuffled_batches(lengths, params.optimizer.batch_tokens, seed * 1000 + epoch),
        prepare=prepare,
        loss=loss,
        evaluate=lambda: judge(model, task, metric, validation, pad_id),
        patience=params.patience,
        tokens={token for row in examples.input_ids for token in row},
        learning_rate_scale=partial(layer_scale, layers=model.config.num_hidden_layers, decay=params.layer_decay),
        adversary=partial(add_adversarial_gradients, model, params.adversarial_epsilon)
        if params.adversarial_epsilon
        else None,
    )
    position = train(model, recipe, run, "finetune")
    save_model(model, run.unit("model"), data / "tokenizer", extend_lineage(run.inputs["model"], "finetune"))
    return {
        "parameters": count_parameters(model),
        "epochs": position.round,
        "best_epoch": position.best_round + 1,
        "validation": validation_quality(model, task, validation, pad_id),
    }


def layer_scale(name: str, layers: int, decay: float) -> float:
    """Share of the learning rate: 1 for the head, `decay` less for each layer further down."""
    if "embeddings" in name:
        return decay ** (layers + 1)
    found = re.search(r"\.layers?\.(\d+)\.", name)
    return decay ** (layers - int(found[1])) if found else 1.0


if __name__ == "__main__":
    command("finetune", run_finetune, inputs=("model", "data"))

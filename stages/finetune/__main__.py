"""Command line of the finetune stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.core.checkpoints import count_parameters, extend_lineage, save_model
from stages.core.examples import Examples, load_examples, load_labels, load_pad_id
from stages.core.judging import judge, validation_quality
from stages.core.stage import StageRun, command
from stages.core.tasks import Task, get_task
from stages.core.tensors import pad_tensors, shuffled_batches
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors
from stages.finetune.adversarial import build_adversary
from stages.finetune.augmentation import add_copies
from stages.finetune.efficient import count_trained, make_efficient
from stages.finetune.layers import learning_rate_shares, reinitialize, set_dropout
from stages.finetune.losses import batch_loss, loss_options
from stages.finetune.mixup import check_mixable, with_partners
from stages.finetune.repeats import folds_of, joined, spread
from stages.finetune.self_training import Learned, load_pool, self_train

Fit = Callable[[str, int, Examples, Examples], Learned]
"""Trains from the pretrained checkpoint, given a name for the curves, a seed, and what to train and validate on."""


def run_finetune(run: StageRun) -> dict[str, Any]:
    """Train the task head and the model under it, as often as asked."""
    data, task, pad_id = run.inputs["data"], get_task(run.params.task.kind), load_pad_id(run.inputs["data"])
    examples, validation = load_examples(data, "train"), load_examples(data, "validation")
    learn: Fit = partial(_learn, run, partial(_fit, run, itertools.count(1)))
    kept, seeds = _train_seeds(run, learn, examples, validation)
    folds = _cross_validate(run, learn, examples, validation)
    save_model(kept.model, run.unit("model"), data / "tokenizer", extend_lineage(run.inputs["model"], "finetune"))
    return {
        "parameters": count_parameters(kept.model),
        "trained_parameters": kept.trained_parameters,
        "training_texts": kept.training_texts,
        "epochs": kept.position.round,
        "best_epoch": kept.position.best_round + 1,
        "validation": validation_quality(kept.model, task, validation, pad_id),
        "self_training": kept.self_training,
        "seeds": seeds,
        "folds": folds,
    }


def _train_seeds(
    run: StageRun, learn: Fit, examples: Examples, validation: Examples
) -> tuple[Learned, dict[str, Any] | None]:
    """Train with each seed; keep the best by validation, and tell the spread where there is more than one."""
    first, count = run.params.seed, run.params.finetune.repeats.seeds
    kept, kept_seed = learn("finetune", first, examples, validation), first
    qualities = {str(first): kept.quality}
    for seed in range(first + 1, first + count):
        other = learn(f"finetune-seed{seed}", seed, examples, validation)
        qualities[str(seed)] = other.quality
        if other.score > kept.score:
            kept, kept_seed = other, seed
    told = {**spread(list(qualities.values())), "kept_seed": kept_seed, "validation": qualities}
    return kept, told if count > 1 else None


def _cross_validate(run: StageRun, learn: Fit, examples: Examples, validation: Examples) -> dict[str, Any] | None:
    """Judge the way of training on parts of the labelled texts that it did not see."""
    count, seed, metric = run.params.finetune.repeats.folds, run.params.seed, run.params.quality.metric
    if not count:
        return None
    task, pad_id = get_task(run.params.task.kind), load_pad_id(run.inputs["data"])
    qualities: dict[str, float] = {}
    for index, (train_on, choose_by, held_out) in enumerate(folds_of(examples, validation, count, seed), start=1):
        learned = learn(f"finetune-fold{index}", seed, train_on, choose_by)
        qualities[str(index)] = validation_quality(learned.model, task, held_out, pad_id)[metric]
    return {**spread(list(qualities.values())), "held_out": qualities}


def _learn(run: StageRun, fit: Fit, phase: str, seed: int, examples: Examples, validation: Examples) -> Learned:
    """Train on the labels, then on what the model labelled where that is asked for."""
    params, data = run.params.finetune, run.inputs["data"]
    first = fit(phase, seed, examples, validation)
    if params.self_training is None:
        return first
    known, pad_id = joined(examples, validation), load_pad_id(data)
    precision = params.optimizer.precision
    pool = load_pool(run.inputs["corpus"], data, known, pad_id, params.self_training, precision, seed)

    def again(name: str, more: Examples) -> Learned:
        return fit(f"{phase}-{name}", seed, more, validation)

    best, told = self_train(first, examples, pool, params.self_training, again)
    return replace(best, self_training=told)


def _fit(
    run: StageRun, numbers: Iterator[int], phase: str, seed: int, examples: Examples, validation: Examples
) -> Learned:
    """Train once from the pretrained checkpoint."""
    torch.manual_seed(seed)
    params, data, number = run.params.finetune, run.inputs["data"], next(numbers)
    task, metric, pad_id = get_task(run.params.task.kind), run.params.quality.metric, load_pad_id(data)
    labels = load_labels(data)
    options = loss_options(params, examples.labels.tolist(), len(labels))
    examples = add_copies(examples, params.augmentation, data, run.inputs["model"], run.inputs.get("lexicon"), seed)
    model = _build_model(run, task, labels)
    lengths = [len(row) for row in examples.input_ids]

    def prepare(batch: Batch) -> Tensors:
        rows = pad_tensors([examples.input_ids[i] for i in batch], pad_id)
        tensors = {**rows, "labels": torch.from_numpy(examples.labels[list(batch)])}
        return with_partners(tensors, params.mixup, (seed, *batch)) if params.mixup else tensors

    def loss(tensors: Tensors) -> Tensor:
        value = batch_loss(model, task, options, params.r_drop, tensors)
        return value if tuning.penalty is None else value + tuning.penalty()

    def batches(epoch: int) -> list[list[int]]:
        return shuffled_batches(lengths, params.optimizer.batch_tokens, seed * 1000 + epoch)

    def evaluate() -> tuple[float, dict[str, float]]:
        score, values = judge(model, task, metric, validation, pad_id)
        return score, {**values, "training": float(number)} if params.trains_more_than_once() else values

    tuning = make_efficient(model, params.efficient, sum(len(batches(epoch)) for epoch in range(params.epochs)))
    trained_parameters = count_trained(model)
    recipe = Recipe(
        optimizer=params.optimizer,
        rounds=params.epochs,
        batches=batches,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        patience=params.patience,
        tokens={pad_id, *(token for row in examples.input_ids for token in row)},
        learning_rate_scale=learning_rate_shares(
            [name for name, _ in model.named_parameters()], params.layer_decay
        ).__getitem__,
        adversary=build_adversary(model, params.adversarial, pad_id),
        after_step=tuning.after_step,
        # R-Drop and mixup call the model in ways of their own, and penalties look at its weights.
        divisible=not params.r_drop and not params.mixup and params.efficient is None,
    )
    position = train(model, recipe, run, phase)
    tuning.finish()
    quality = validation_quality(model, task, validation, pad_id)[metric]
    return Learned(model, position, trained_parameters, len(examples), quality)


def _build_model(run: StageRun, task: Task, labels: Sequence[str]) -> Any:
    """The pretrained checkpoint under a fresh head, changed as the params ask."""
    params = run.params.finetune
    model: Any = task.build_model(run.inputs["model"], labels)
    if params.mixup:
        check_mixable(model)
    reinitialize(model, params.reinitialized_layers)
    set_dropout(model, params.dropout)
    return model


if __name__ == "__main__":
    command(
        "finetune",
        run_finetune,
        inputs=("model", "data", "corpus"),
        optional=("lexicon",),
        parallel=("data", "shards", "tensor", "pipeline"),
    )

"""Command line of the prune stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.distillation import Lesson, build_lesson, distillation_recipe
from stages.core.examples import Examples, load_examples, load_pad_id, sample
from stages.core.judging import validation_quality
from stages.core.observe.progress import track
from stages.core.stage import StageRun, command
from stages.core.structure import encoder_layers, keep_parts, layer_widths, widths_to_json
from stages.core.tasks import Task, get_task
from stages.core.tensors import pad_tensors
from stages.core.training import train
from stages.prune.saliency import measure_saliency
from stages.prune.select import parts_to_keep
from stages.prune.sparse import make_sparse
from stages.prune.vocabulary import trim_to_texts

_BATCH_SIZE = 32


def run_prune(run: StageRun) -> dict[str, Any]:
    """Cut and recover in rounds, or hand the student through where nothing is to be cut."""
    params, data = run.params.prune, run.inputs["data"]
    task, pad_id = get_task(run.params.task.kind), load_pad_id(data)
    model, validation = load_model(run.inputs["model"]), load_examples(data, "validation")
    before = validation_quality(model, task, validation, pad_id)
    cuts: list[dict[str, Any]] = []
    if params.sparsity.heads or params.sparsity.neurons:
        labelled = load_examples(data, "train")
        lesson = _lesson(run) if params.recovery.epochs else None
        calibration = sample(labelled, params.calibration_texts, run.params.seed)
        for index in range(params.rounds):
            _cut(model, task, calibration, pad_id, run, index)
            cut = validation_quality(model, task, validation, pad_id)
            run.say(f"round {index + 1}: accuracy {before['accuracy']:.4f} before, {cut['accuracy']:.4f} after the cut")
            cuts.append({"widths": widths_to_json(layer_widths(model)), "validation": cut})
            if lesson is not None:
                recovery = params.recovery
                recipe = distillation_recipe(
                    model, task, lesson, range(len(lesson.teacher.hidden)), validation, recovery.optimizer,
                    recovery.epochs, run,
                )  # fmt: skip
                train(model, recipe, run, f"recover-{index + 1}")
    sparse = make_sparse(model, run)
    trimmed = trim_to_texts(model, run)
    folder = run.unit("model")
    save_model(model, folder, data / "tokenizer", extend_lineage(run.inputs["model"], "prune"))
    if trimmed is not None:
        trimmed.write(folder)
        validation, pad_id = load_examples(data, "validation", folder), load_pad_id(data, folder)
    return {
        "parameters": count_parameters(model),
        "widths": widths_to_json(layer_widths(model)),
        "before": before,
        "cuts": {str(index + 1): cut for index, cut in enumerate(cuts)},
        "validation": validation_quality(model, task, validation, pad_id),
        "sparse": sparse,
        "vocabulary": None if trimmed is None else trimmed.metrics,
    }


def _lesson(run: StageRun) -> Lesson:
    """The same lesson as in distillation, so the teacher's answers are already there."""
    return build_lesson(
        run.params.distill, run.inputs["teacher"], run.inputs["data"], run.inputs["corpus"], run.params.seed
    )


def _cut(model: nn.Module, task: Task, calibration: Examples, pad_id: int, run: StageRun, index: int) -> None:
    """Remove what matters least, as much as round `index` is due."""
    params, rounds = run.params.prune, run.params.prune.rounds

    def loss(batch: Sequence[int]) -> Tensor:
        inputs = pad_tensors([calibration.input_ids[i] for i in batch], pad_id)
        labels = torch.from_numpy(calibration.labels[list(batch)])
        return task.loss(model(**inputs).logits, labels, smoothing=0.0) * len(batch)

    batches = length_batches([len(row) for row in calibration.input_ids], _BATCH_SIZE)
    saliency = measure_saliency(model, list(track(batches, "saliency")), loss, params.saliency)
    heads = parts_to_keep([s.heads for s in saliency], _of_what_is_left(params.sparsity.heads, index, rounds), 1, 1)
    multiple = params.neuron_multiple
    neurons = parts_to_keep(
        [s.neurons for s in saliency], _of_what_is_left(params.sparsity.neurons, index, rounds), multiple, multiple
    )
    for layer, kept_heads, kept_neurons in zip(encoder_layers(model), heads, neurons, strict=True):
        keep_parts(layer, kept_heads, kept_neurons)


def _of_what_is_left(sparsity: float, index: int, rounds: int) -> float:
    """Share of the parts still there that round `index` removes, so that all rounds together reach the sparsity."""
    there = 1.0 - sparsity * index / rounds
    return sparsity / rounds / there


if __name__ == "__main__":
    command("prune", run_prune, inputs=("model", "teacher", "data", "corpus"))

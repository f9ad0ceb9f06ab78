"""Command line of the prune stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.distillation import Lesson, build_lesson, layer_count, matched_layers, teach
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_pad_id, sample
from stages.core.judging import predict_logits, validation_quality
from stages.core.latency import LatencyTable, read_table, workload
from stages.core.observe.progress import track
from stages.core.params import LayersStudent, PruneParams
from stages.core.sliced import check_sliceable
from stages.core.stage import StageRun, command
from stages.core.structure import LayerWidth, layer_widths, widths_to_json
from stages.core.tasks import Task, get_task
from stages.core.tensors import pad_tensors
from stages.prune.clock import Clock, deployment_clock
from stages.prune.layers import drop_layers
from stages.prune.reconstruct import reconstruct
from stages.prune.saliency import Saliency, gate_gradients, score
from stages.prune.select import parts_to_keep
from stages.prune.slicing import make_narrow
from stages.prune.sparse import make_sparse
from stages.prune.target import cut_to_speedup, keep, nearest
from stages.prune.vocabulary import trim_to_texts

_BATCH_SIZE = 32


def run_prune(run: StageRun) -> dict[str, Any]:
    """Drop layers, slice, cut and recover in rounds; or hand the student through where nothing is to be cut."""
    params, data = run.params.prune, run.inputs["data"]
    task, pad_id, model = get_task(run.params.task.kind), load_pad_id(data), load_model(run.inputs["model"])
    if params.hidden_slicing:
        check_sliceable(model)
    validation = load_examples(data, "validation")
    calibration = sample(load_examples(data, "train"), params.calibration_texts, run.params.seed)
    before = validation_quality(model, task, validation, pad_id)
    whole, cuts = layer_widths(model), []
    with _clock(run, model) as clock:
        layers = _drop_layers(model, task, calibration, pad_id, params)
        dropped = layer_widths(model)
        sliced = make_narrow(model, run, clock)
        wants_cuts = _wants_cuts(params)
        lesson = _lesson(run, layers) if params.recovery.epochs and (wants_cuts or sliced is not None) else None
        if wants_cuts:
            head_start = _head_start(run, whole, dropped, sliced)
            for index in range(params.rounds):
                cut = _cut(model, whole, head_start, task, calibration, pad_id, run, index, clock)
                cut["validation"] = validation_quality(model, task, validation, pad_id)
                cuts.append(cut)
                run.say(_describe(index, before, cut))
                if lesson is not None:
                    _recover(model, task, lesson, validation, run, index)
        elif lesson is not None:
            _recover(model, task, lesson, validation, run, 0)
    sparse = make_sparse(model, run)
    trimmed = trim_to_texts(model, run)
    folder = run.unit("model")
    save_model(model, folder, data / "tokenizer", extend_lineage(run.inputs["model"], "prune"))
    if trimmed is not None:
        trimmed.write(folder)
        validation, pad_id = load_examples(data, "validation", folder), load_pad_id(data, folder)
    return {
        "parameters": count_parameters(model),
        "layers": layers,
        "hidden": sliced,
        "widths": widths_to_json(layer_widths(model)),
        "speedup": _speedup(params, cuts),
        "before": before,
        "cuts": {str(index + 1): cut for index, cut in enumerate(cuts)},
        "validation": validation_quality(model, task, validation, pad_id),
        "sparse": sparse,
        "vocabulary": None if trimmed is None else trimmed.metrics,
    }


def _wants_cuts(params: PruneParams) -> bool:
    if params.speedup is not None:
        return params.speedup > 1.0
    return bool(params.sparsity.heads or params.sparsity.neurons)


def _clock(run: StageRun, model: nn.Module) -> AbstractContextManager[Clock | None]:
    """Time candidates against the stage's input, where there is a target."""
    params = run.params.prune
    if params.speedup is None or not _wants_cuts(params):
        return nullcontext()
    data, seed = run.inputs["data"], run.params.seed
    batches = workload(load_examples(data, "train"), params.goal, load_pad_id(data), seed)
    run.say("export the input of the stage as it would be deployed, to time candidates against it")
    return deployment_clock(model, _table(run), params.goal, batches, seed)


def _table(run: StageRun) -> LatencyTable:
    table = read_table(run.inputs["table"])
    if table is None:
        raise UserError(f"{run.inputs['table']}: holds no times, which prune.speedup needs; run latency_table again")
    return table


def _drop_layers(
    model: nn.Module, task: Task, calibration: Examples, pad_id: int, params: PruneParams
) -> list[int] | None:
    if params.layers is None:
        return None

    def loss(shorter: nn.Module) -> float:
        logits = predict_logits(shorter, calibration.input_ids, pad_id)
        return float(task.loss(logits, torch.from_numpy(calibration.labels)))

    return drop_layers(model, params.layers, loss)


def _head_start(
    run: StageRun, whole: Sequence[LayerWidth], dropped: Sequence[LayerWidth], sliced: dict[str, Any] | None
) -> float:
    """Measured speedup by slicing, which the table of times does not know: it was measured at the full hidden width."""
    if sliced is None or sliced["speedup"] is None:
        return 1.0
    table = _table(run)
    speedup: float = sliced["speedup"]
    return speedup * table.model_seconds(dropped) / table.model_seconds(whole)


def _lesson(run: StageRun, layers: Sequence[int] | None) -> Lesson:
    """The same lesson as in distillation, so the teacher's answers are already there, unless layers were dropped."""
    params, teacher = run.params.distill, run.inputs["teacher"]
    if layers is not None:
        matched = matched_layers(params.student, layer_count(teacher))
        student = LayersStudent(kind="layers", layers=[matched[layer] for layer in layers])
        params = params.model_copy(update={"student": student})
    return build_lesson(params, teacher, run.inputs["data"], run.inputs["corpus"], run.params.seed)


def _cut(
    model: nn.Module,
    whole: Sequence[LayerWidth],
    head_start: float,
    task: Task,
    calibration: Examples,
    pad_id: int,
    run: StageRun,
    index: int,
    clock: Clock | None,
) -> dict[str, Any]:
    """Remove what matters least, as much as round `index` is due, and describe it."""
    params, dense = run.params.prune, copy.deepcopy(model)
    gradients = _gradients(model, task, calibration, pad_id)
    cut: dict[str, Any] = {}
    if params.speedup is None or clock is None:
        keep(model, _by_sparsity(gradients, params, index))
    else:
        target, multiple = params.speedup ** ((index + 1) / params.rounds), params.neuron_multiple
        attempts = cut_to_speedup(
            model, whole, head_start, target, _table(run), gradients, multiple, params.saliency, clock
        )
        best = nearest(attempts, target)
        cut |= {"requested": target, "predicted": best.predicted, "achieved": best.achieved, "attempts": len(attempts)}
    if params.reconstruct:
        reconstruct(model, dense, calibration.input_ids, pad_id)
    return {**cut, "widths": widths_to_json(layer_widths(model))}


def _gradients(model: nn.Module, task: Task, calibration: Examples, pad_id: int) -> list[Saliency]:
    def loss(batch: Sequence[int]) -> Tensor:
        inputs = pad_tensors([calibration.input_ids[i] for i in batch], pad_id)
        labels = torch.from_numpy(calibration.labels[list(batch)])
        return task.loss(model(**inputs).logits, labels) * len(batch)

    batches = length_batches([len(row) for row in calibration.input_ids], _BATCH_SIZE)
    return gate_gradients(model, list(track(batches, "saliency")), loss)


def _by_sparsity(gradients: Sequence[Saliency], params: PruneParams, index: int) -> list[Saliency]:
    """Parts that stay in round `index`, by their share alone; every layer keeps some."""
    scores, rounds, multiple = score(gradients, params.saliency), params.rounds, params.neuron_multiple
    heads = parts_to_keep([s.heads for s in scores], _of_what_is_left(params.sparsity.heads, index, rounds), 1, 1)
    neurons = parts_to_keep(
        [s.neurons for s in scores], _of_what_is_left(params.sparsity.neurons, index, rounds), multiple, multiple
    )
    return [Saliency(*kept) for kept in zip(heads, neurons, strict=True)]


def _recover(model: nn.Module, task: Task, lesson: Lesson, validation: Examples, run: StageRun, index: int) -> None:
    recovery, layers = run.params.prune.recovery, range(lesson.layers)
    phase = f"recover-{index + 1}"
    teach(model, task, lesson, layers, validation, recovery.optimizer, recovery.epochs, run, phase)


def _speedup(params: PruneParams, cuts: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """What was asked of the clock and what it said in the end."""
    if params.speedup is None:
        return None
    achieved = cuts[-1]["achieved"] if cuts else 1.0
    return {"requested": params.speedup, "achieved": achieved, "ratio": achieved / params.speedup}


def _describe(index: int, before: dict[str, float], cut: dict[str, Any]) -> str:
    fast = f"{cut['achieved']:.2f} times as fast (asked: {cut['requested']:.2f}), " if "achieved" in cut else ""
    after = cut["validation"]["accuracy"]
    return f"round {index + 1}: {fast}accuracy {before['accuracy']:.4f} before, {after:.4f} after the cut"


def _of_what_is_left(sparsity: float, index: int, rounds: int) -> float:
    """Share of the parts still there that round `index` removes, so that all rounds together reach the sparsity."""
    there = 1.0 - sparsity * index / rounds
    return sparsity / rounds / there


if __name__ == "__main__":
    command("prune", run_prune, inputs=("model", "teacher", "data", "corpus", "table"), parallel=("data", "shards"))

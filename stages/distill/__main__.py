"""Command line of the distill stage."""

from __future__ import annotations

from typing import Any

from stages.core.checkpoints import count_parameters, extend_lineage, load_model, load_tokenizer, save_model
from stages.core.distillation import Lesson, add_transfer_texts, distillation_recipe, teacher_outputs
from stages.core.examples import load_examples, load_maximum_length, load_pad_id
from stages.core.judging import validation_quality
from stages.core.stage import StageRun, command
from stages.core.structure import keep_layers
from stages.core.tasks import get_task
from stages.core.training import train


def run_distill(run: StageRun) -> dict[str, Any]:
    """Cut the student out of the teacher and teach it."""
    params, data, teacher = run.params.distill, run.inputs["data"], run.inputs["teacher"]
    task, pad_id = get_task(run.params.task.kind), load_pad_id(data)
    tokenizer, validation = load_tokenizer(data / "tokenizer"), load_examples(data, "validation")
    student = load_model(teacher)
    keep_layers(student, params.layers)

    labelled = load_examples(data, "train")
    examples = add_transfer_texts(
        labelled, run.inputs["corpus"], params.transfer, tokenizer, load_maximum_length(data), run.params.seed
    )
    kept = params.layers if params.weights.hidden else []
    lesson = Lesson(
        examples, teacher_outputs(teacher, examples, kept, pad_id), params.weights, params.temperature, pad_id
    )
    recipe = distillation_recipe(
        student, task, lesson, range(len(kept)), validation, params.optimizer, params.epochs, run
    )
    position = train(student, recipe, run, "distill")
    save_model(student, run.unit("model"), data / "tokenizer", extend_lineage(teacher, "distill"))
    return {
        "parameters": count_parameters(student),
        "transfer_texts": len(examples) - len(labelled),
        "best_epoch": position.best_round + 1,
        "validation": validation_quality(student, task, validation, pad_id),
    }


if __name__ == "__main__":
    command("distill", run_distill, inputs=("teacher", "data", "corpus"))

"""Command line of the distill stage."""

from __future__ import annotations

from typing import Any

from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.distillation import build_lesson, distillation_recipe
from stages.core.examples import load_examples
from stages.core.judging import validation_quality
from stages.core.stage import StageRun, command
from stages.core.structure import keep_layers
from stages.core.tasks import get_task
from stages.core.training import train


def run_distill(run: StageRun) -> dict[str, Any]:
    """Cut the student out of the teacher and teach it."""
    params, data, teacher = run.params.distill, run.inputs["data"], run.inputs["teacher"]
    task, validation = get_task(run.params.task.kind), load_examples(data, "validation")
    student = load_model(teacher)
    keep_layers(student, params.layers)
    lesson = build_lesson(params, teacher, data, run.inputs["corpus"], run.params.seed)
    layers = range(len(lesson.teacher.hidden))
    recipe = distillation_recipe(student, task, lesson, layers, validation, params.optimizer, params.epochs, run)
    position = train(student, recipe, run, "distill")
    save_model(student, run.unit("model"), data / "tokenizer", extend_lineage(teacher, "distill"))
    return {
        "parameters": count_parameters(student),
        "transfer_texts": int((lesson.examples.labels < 0).sum()),
        "best_epoch": position.best_round + 1,
        "validation": validation_quality(student, task, validation, lesson.pad_id),
    }


if __name__ == "__main__":
    command("distill", run_distill, inputs=("teacher", "data", "corpus"))

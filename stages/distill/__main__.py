"""Command line of the distill stage."""

from __future__ import annotations

from typing import Any

from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.distillation import build_lesson, teach
from stages.core.examples import load_examples, load_labels
from stages.core.judging import validation_quality
from stages.core.stage import StageRun, command
from stages.core.tasks import get_task
from stages.distill.student import build_student


def run_distill(run: StageRun) -> dict[str, Any]:
    """Make the student and teach it."""
    params, data, teacher = run.params.distill, run.inputs["data"], run.inputs["teacher"]
    task, validation = get_task(run.params.task.kind), load_examples(data, "validation")
    student = build_student(params.student, load_model(teacher), task, load_labels(data), data)
    lesson = build_lesson(
        params, teacher, data, run.inputs["corpus"], run.params.seed, run.inputs["language_model"]
    )  # fmt: skip
    position = teach(
        student, task, lesson, range(lesson.layers), validation, params.optimizer, params.epochs, run, "distill"
    )
    save_model(student, run.unit("model"), data / "tokenizer", extend_lineage(teacher, "distill"))
    return {
        "parameters": count_parameters(student),
        "teachers": 1 + len(params.teachers),
        "transfer_texts": int((lesson.examples.labels < 0).sum()),
        "best_epoch": position.best_round + 1,
        "validation": validation_quality(student, task, validation, lesson.pad_id),
    }


if __name__ == "__main__":
    command("distill", run_distill, inputs=("teacher", "data", "corpus", "language_model"), parallel=("data", "shards"))

"""`python -m stages.review`: the texts most worth a human look -> review.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pandas

from stages.core.checkpoints import load_model
from stages.core.errors import UserError
from stages.core.examples import SPLITS, Examples, load_examples, load_labels, load_pad_id
from stages.core.metrics import Array
from stages.core.stage import StageRun, command
from stages.core.tables import frame_of, write_table
from stages.review.choose import COLUMNS, Answer, Doubt, Judged, choose, count_reasons
from stages.review.doubts import label_doubts, noise_rate
from stages.review.judge import out_of_sample, read_texts, small_classes


def run_review(run: StageRun) -> dict[str, Any]:
    """Write review.csv; return counts."""
    params, names = run.params.review, load_labels(run.inputs["data"])
    splits = {name: load_examples(run.inputs["data"], name, run.inputs["model"]) for name in SPLITS}
    model, pad_id = load_model(run.inputs["model"]), load_pad_id(run.inputs["data"], run.inputs["model"])
    run.say(f"{sum(map(len, splits.values()))} texts")
    read = {name: read_texts(model, examples.input_ids, pad_id) for name, examples in splits.items()}
    train = splits["train"].labels
    for label in small_classes(train, len(names), params.folds):
        run.say(f"{names[label]}: fewer than {params.folds} training texts; their labels are not doubted")
    outside = {
        "train": out_of_sample(read["train"][0], train, len(names), params.folds, run.params.seed),
        **{name: read[name][1] for name in SPLITS if name != "train"},
    }
    compressed = _test_answers(run.inputs["final"], splits["test"])
    finetuned = {name: _answers(read[name][1], names) for name in SPLITS}
    finetuned["test"] = _test_answers(run.inputs["finetuned"], splits["test"])
    judged = [
        judgement
        for name, examples in splits.items()
        for judgement in _judge(
            name, examples, names, finetuned[name], compressed if name == "test" else None, outside[name]
        )
    ]
    chosen = choose(judged, params.texts, params.low_confidence)
    write_table(frame_of(COLUMNS, [entry.row() for entry in chosen]), run.staging / "review.csv")
    counts = count_reasons(chosen)
    run.say(f"{len(chosen)} texts to look at: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return {
        "texts": len(chosen),
        "reasons": counts,
        "flips": sum(judgement.flipped for judgement in judged),
        "label_doubts": {
            name: sum(judgement.doubt is not None for judgement in judged if judgement.split == name) for name in SPLITS
        },
        "estimated_noise": {name: noise_rate(outside[name], splits[name].labels) for name in SPLITS},
    }


def _judge(
    split: str,
    examples: Examples,
    names: list[str],
    finetuned: list[Answer],
    compressed: list[Answer] | None,
    probabilities: Array,
) -> list[Judged]:
    """Put what is known of the texts of a split together; `probabilities` are of models that did not learn them."""
    doubts = {
        doubt.index: Doubt(names[doubt.suggestion], doubt.likely, doubt.given)
        for doubt in label_doubts(probabilities, examples.labels)
    }
    return [
        Judged(
            split=split,
            text=text,
            label=names[label],
            finetuned=finetuned[index],
            compressed=compressed[index] if compressed else None,
            doubt=doubts.get(index),
        )
        for index, (text, label) in enumerate(zip(examples.texts, examples.labels, strict=True))
    ]


def _answers(probabilities: Array, names: list[str]) -> list[Answer]:
    best = probabilities.argmax(axis=1)
    return [
        Answer(names[index], float(score))
        for index, score in zip(best, probabilities[numpy.arange(len(best)), best], strict=True)
    ]


def _test_answers(evaluation: Path, test: Examples) -> list[Answer]:
    """Answers that an evaluation noted, in the order of the test split.

    Raises:
        UserError: if they are about other texts.
    """
    path = evaluation / "predictions.parquet"
    frame = pandas.read_parquet(path, columns=["text", "prediction", "score"])
    if frame["text"].tolist() != test.texts:
        raise UserError(f"{path}: is about other texts than the test split; run `dvc repro evaluate` to make it anew")
    return [Answer(label, float(score)) for label, score in zip(frame["prediction"], frame["score"], strict=True)]


if __name__ == "__main__":
    command("review", run_review, inputs=("finetuned", "final", "data", "model"))

"""`python -m stages.robustness`: one exported model on changed texts and on texts from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas

from stages.core.artifacts import digest, read_json
from stages.core.cascade import Exported, load_exported
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_labels
from stages.core.stage import StageRun, command
from stages.core.tables import read_table
from stages.robustness.answers import answer_groups
from stages.robustness.findings import (
    detection_rows,
    flipped,
    overall,
    perturbation_rows,
    right_everywhere,
    sensitivity_rows,
    shift_rows,
)
from stages.robustness.texts import TEST, Texts, gather


def run_robustness(run: StageRun) -> dict[str, Any]:
    """Ask the model and the reference; write the tables; return the metrics."""
    params, seed = run.params.robustness, run.params.seed
    model = load_exported(run.inputs["model"])
    texts = _texts(run, model)
    run.say(f"{len(texts.test)} texts, {len(texts.perturbed)} perturbations, {len(texts.shifted)} other domains")
    answers = answer_groups(model, texts.groups())
    itself = digest(run.inputs["model"]) == digest(run.inputs["reference"])
    reference = answers if itself else answer_groups(load_exported(run.inputs["reference"]), texts.groups())
    perturbations = perturbation_rows(texts, answers, reference, params, seed)
    sensitivity = sensitivity_rows(texts, answers, reference, params)
    shift = shift_rows(texts, answers, reference, params, seed)
    _write_table(run, "perturbations", {**perturbations, **sensitivity})
    _write_table(run, "shift", shift)
    flipped(texts, answers, model.labels, params).to_parquet(run.staging / "examples.parquet")
    return {
        "variant": run.name.partition("@")[2],
        "texts": len(texts.test),
        "copies": params.copies,
        "confidence": params.confidence,
        "accuracy": shift[TEST]["accuracy"],
        "reference_accuracy": shift[TEST]["reference_accuracy"],
        **overall(perturbations, right_everywhere(texts, answers, params)),
        "perturbations": perturbations,
        "sensitivity": sensitivity,
        "shift": shift,
        "out_of_distribution": detection_rows(texts, answers, params, seed),
    }


def _texts(run: StageRun, model: Exported) -> Texts:
    data = run.inputs["data"]
    names = tuple(load_labels(data))
    if names != model.labels:
        raise UserError(
            f"{data / 'labels.json'}: the data has labels {', '.join(names)}, the model {', '.join(model.labels)}; "
            "run `dvc repro` to make both from the same data"
        )
    elsewhere = read_table(run.inputs["shifted"] / "shifted.parquet", "parquet", "utf-8")
    corpus = read_table(run.inputs["corpus"] / "corpus.parquet", "parquet", "utf-8")["text"].tolist()
    synonyms = read_json(run.inputs["lexicon"] / "synonyms.json")
    return gather(
        load_examples(data, "test"), elsewhere, corpus, synonyms, names, run.params.robustness, run.params.seed
    )


def _write_table(run: StageRun, name: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    frame = pandas.DataFrame([{"name": key, **row} for key, row in rows.items()])
    frame.to_csv(run.staging / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    inputs = ("model", "reference", "data", "shifted", "corpus", "lexicon")
    command("robustness", run_robustness, inputs=inputs, variants=True)

"""`python -m stages.clean`: raw splits, other domains and corpus -> cleaned ones, and the rejects."""

from __future__ import annotations

from typing import Any

from stages.clean.corpus import clean_corpus
from stages.clean.corrections import read_corrections
from stages.clean.labelled import SPLITS, clean_labelled
from stages.clean.ledger import (
    CORPUS,
    CORPUS_REMOVALS,
    RELABELLED,
    REMOVALS,
    REPAIRS,
    SHIFTED,
    SHIFTED_REMOVALS,
    Ledger,
)
from stages.clean.shifted import clean_shifted
from stages.core.artifacts import write_json
from stages.core.stage import StageRun, command
from stages.core.tables import frame_of, read_table, write_table


def run_clean(run: StageRun) -> dict[str, Any]:
    """Clean the splits, then the other domains, which must hold none of them, and the corpus, which must not give
    away test and validation; return counts.
    """
    params, ledger = run.params.clean, Ledger()
    corrections = read_corrections(params.corrections)
    raw = {name: read_table(run.inputs["data"] / f"{name}.parquet", "parquet", "utf-8") for name in SPLITS}
    elsewhere = read_table(run.inputs["shifted"] / "shifted.parquet", "parquet", "utf-8")
    texts = read_table(run.inputs["corpus"] / "corpus.parquet", "parquet", "utf-8")["text"].tolist()
    splits = clean_labelled(raw, params, corrections, ledger)
    shifted = clean_shifted(elsewhere, splits, params, ledger)
    protected = [*splits["test"]["text"], *splits["validation"]["text"]]
    corpus = clean_corpus(texts, protected, params, ledger)
    data = run.unit("data")
    for name, frame in splits.items():
        write_table(frame, data / f"{name}.parquet")
    labels = sorted(set(splits["train"]["label"]))
    write_json(data / "labels.json", labels)
    write_table(shifted, run.unit("shifted") / "shifted.parquet")
    write_table(frame_of(["text"], [[text] for text in corpus]), run.unit("corpus") / "corpus.parquet")
    write_table(ledger.rejects(), run.staging / "rejects.parquet")
    write_table(ledger.corrections(), run.staging / "corrections.parquet")
    write_table(ledger.rules((*SPLITS, CORPUS)), run.staging / "rules.csv")
    kept = sum(map(len, splits.values()))
    run.say(
        f"{kept} of {sum(map(len, raw.values()))} labelled texts and {len(corpus)} of {len(texts)} of the corpus stay"
    )
    return {
        "rows": {name: {"in": len(raw[name]), "out": len(splits[name])} for name in SPLITS},
        "labels": len(labels),
        "repaired": ledger.totals(REPAIRS, SPLITS),
        "removed": ledger.totals(REMOVALS, SPLITS),
        "corrections": {
            "file": corrections.file,
            "sha256": corrections.sha256,
            "given": len(corrections.entries),
            **ledger.totals((RELABELLED, "dropped"), SPLITS),
        },
        "shifted": {
            "in": len(elsewhere),
            "out": len(shifted),
            "repaired": ledger.totals(REPAIRS, (SHIFTED,)),
            "removed": ledger.totals(SHIFTED_REMOVALS, (SHIFTED,)),
        },
        "corpus": {
            "in": len(texts),
            "out": len(corpus),
            "repaired": ledger.totals(REPAIRS, (CORPUS,)),
            "removed": ledger.totals(CORPUS_REMOVALS, (CORPUS,)),
        },
    }


if __name__ == "__main__":
    command("clean", run_clean, inputs=("data", "shifted", "corpus"))

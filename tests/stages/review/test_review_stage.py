from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from stages.clean.__main__ import run_clean
from stages.core.artifacts import text_sha256, write_manifest
from stages.core.errors import UserError
from stages.core.observe.tracking import RunRecord
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.tables import frame_of, write_table
from stages.review.__main__ import run_review
from stages.review.choose import (
    COLUMNS,
    FLIP,
    LABEL_DOUBT,
    LOW_CONFIDENCE,
    Answer,
    Doubt,
    Judged,
    choose,
    count_reasons,
)

ROOT = Path(__file__).parents[3]
LABELS = ["animal", "number", "place"]


def judged(text: str, finetuned: str = "x", compressed: str | None = "x", **changes: Any) -> Judged:
    confidence, doubt = changes.get("confidence", 0.9), changes.get("doubt")
    answer = None if compressed is None else Answer(compressed, confidence)
    return Judged("train" if compressed is None else "test", text, "x", Answer(finetuned, 0.8), answer, doubt)


def test_reasons_take_turns_and_the_strongest_of_each_come_first() -> None:
    texts = [
        judged("nothing"),
        judged("flip unsure", compressed="y", confidence=0.41),
        judged("flip sure", compressed="y", confidence=0.75),
        judged("doubt small", compressed=None, doubt=Doubt("y", 0.5, 0.4)),
        judged("doubt large", compressed=None, doubt=Doubt("y", 0.9, 0.1)),
        judged("unsure", confidence=0.4),
    ]
    chosen = choose(texts, 10, low_confidence=0.5)
    assert [entry.judged.text for entry in chosen] == [
        "flip sure", "doubt large", "unsure", "flip unsure", "doubt small",
    ]  # fmt: skip
    assert list(chosen[3].reasons) == [FLIP, LOW_CONFIDENCE]
    assert count_reasons(chosen) == {FLIP: 2, LABEL_DOUBT: 2, LOW_CONFIDENCE: 2}
    assert [entry.judged.text for entry in choose(texts, 2, low_confidence=0.5)] == ["flip sure", "doubt large"]
    assert choose(texts, 0, low_confidence=0.5) == []


def test_a_row_says_why_and_leaves_room_for_the_reviewer() -> None:
    (entry,) = choose([judged("Who?", compressed="y", confidence=0.41, doubt=Doubt("y", 0.7, 0.2))], 1, 0.5)
    row = dict(zip(COLUMNS, entry.row(), strict=True))
    assert row["key"] == text_sha256("Who?")
    assert row["why"] == (
        "The fine-tuned model answers x (80%), the compressed one y (41%). "
        "The label is in doubt: to a model that did not learn it, y is 70% likely, x 20%. "
        "The compressed model is unsure: y (41%)."
    )
    assert row["reasons"] == "flip label_doubt low_confidence"
    assert (row["doubt"], row["correction"], row["note"], row["reviewer"]) == ("0.5000", "", "", "")


@pytest.fixture
def inputs(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Path]:
    """Tokenized data with one training label planted wrong; the compressed model flips an answer, unsure of another."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    train = pandas.read_parquet(data / "train.parquet")
    train.loc[7, "label"] = (train.loc[7, "label"] + 1) % len(LABELS)
    train.to_parquet(data / "train.parquet")
    write_manifest(data)
    test = pandas.read_parquet(data / "test.parquet")
    names = [LABELS[label] for label in test["label"]]
    right = pandas.DataFrame({"text": test["text"], "label": names, "prediction": names, "score": 0.9})
    flipped = right.copy()
    flipped.loc[4, "prediction"] = LABELS[(test.loc[4, "label"] + 1) % len(LABELS)]
    flipped.loc[5, "score"] = 0.3
    for name, frame in (("finetuned", right), ("final", flipped)):
        (tmp_path / name).mkdir()
        frame.to_parquet(tmp_path / name / "predictions.parquet")
        write_manifest(tmp_path / name)
    return {"finetuned": tmp_path / "finetuned", "final": tmp_path / "final", "data": data, "model": tiny_checkpoint}


def stage_run(name: str, inputs: dict[str, Path], folder: Path, **clean: Any) -> StageRun:
    raw = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text(encoding="utf-8"))
    raw["clean"].update(near_duplicates=None, minimum_characters=1, **clean)
    staging = folder / f"{name} out"
    staging.mkdir()
    record = RunRecord(folder / "record", {}, "")
    return StageRun(name, parse_params(raw, "params.yaml"), inputs, staging, folder / "state", record)


def test_the_whole_circle_from_review_to_corrected_labels(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = stage_run("review", inputs, tmp_path)
    metrics = run_review(run)
    review = pandas.read_csv(run.staging / "review.csv", dtype=str, keep_default_na=False)
    assert tuple(review.columns) == COLUMNS
    assert metrics["flips"] == 1
    assert metrics["texts"] == len(review)
    train = pandas.read_parquet(inputs["data"] / "train.parquet")
    test = pandas.read_parquet(inputs["data"] / "test.parquet")
    by_text = review.set_index("text")
    planted, flip, unsure = train.loc[7, "text"], test.loc[4, "text"], test.loc[5, "text"]
    assert by_text.loc[planted, "split"] == "train"
    assert by_text.loc[planted, "suggestion"] == LABELS[7 % len(LABELS)]
    assert FLIP in by_text.loc[flip, "reasons"]
    assert LOW_CONFIDENCE in by_text.loc[unsure, "reasons"]

    filled = review.copy()
    filled.loc[filled["text"] == planted, ["correction", "note", "reviewer"]] = [LABELS[1], "planted", "Ada"]
    filled.loc[filled["text"] == flip, "correction"] = "drop"
    write_table(filled, tmp_path / "filled.csv")
    before = {name: labelled(inputs["data"] / f"{name}.parquet", LABELS) for name in ("train", "validation", "test")}
    folder = tmp_path / "raw"
    for name, rows in before.items():
        write_table(frame_of(["text", "label"], list(rows.items())), folder / f"{name}.parquet")
    write_table(frame_of(["text"], []), tmp_path / "corpus" / "corpus.parquet")
    write_table(frame_of(["domain", "text", "label"], []), tmp_path / "shifted" / "shifted.parquet")
    raw = {"data": folder, "corpus": tmp_path / "corpus", "shifted": tmp_path / "shifted"}
    cleaning = stage_run("clean", raw, tmp_path, corrections=str(tmp_path / "filled.csv"))
    counts = run_clean(cleaning)["corrections"]
    after = {name: labelled(cleaning.staging / "data" / f"{name}.parquet") for name in before}
    assert after["train"][planted] == LABELS[1] != before["train"][planted]
    assert flip in before["test"]
    assert after["test"] == {text: label for text, label in before["test"].items() if text != flip}
    # Some of the made-up texts are in several splits, and cleaning keeps one; no other label changed.
    others = {name: {text: label for text, label in rows.items() if text != planted} for name, rows in after.items()}
    assert all(rows.items() <= before[name].items() for name, rows in others.items())
    assert (counts["given"], counts["relabelled"], counts["dropped"]) == (2, 1, 1)
    provenance = pandas.read_parquet(cleaning.staging / "corrections.parquet").set_index("text").loc[planted]
    assert (provenance["before"], provenance["after"]) == (before["train"][planted], LABELS[1])
    assert (provenance["reviewer"], provenance["note"]) == ("Ada", "planted")
    assert provenance["sha256"] == counts["sha256"]


def labelled(path: Path, names: list[str] | None = None) -> dict[str, str]:
    frame = pandas.read_parquet(path)
    labels = [names[label] for label in frame["label"]] if names else frame["label"].tolist()
    return dict(zip(frame["text"], labels, strict=True))


def test_predictions_about_other_texts_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    path = inputs["final"] / "predictions.parquet"
    pandas.read_parquet(path)[1:].to_parquet(path)
    with pytest.raises(UserError, match="about other texts than the test split"):
        run_review(stage_run("review", inputs, tmp_path))

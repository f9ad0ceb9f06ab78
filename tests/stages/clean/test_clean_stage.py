from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from stages.clean.__main__ import run_clean
from stages.clean.corrections import read_corrections
from stages.clean.labelled import clean_labelled
from stages.clean.ledger import Ledger
from stages.core.artifacts import write_manifest
from stages.core.errors import UserError
from stages.core.observe.tracking import RunRecord
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.tables import frame_of, write_table

ROOT = Path(__file__).parents[3]
LONG = "Which American city has the largest number of bridges over a river that freezes in winter ?"
Rows = list[tuple[str, str]]
Clean = Callable[..., tuple[dict[str, Any], Path]]

TRAIN: Rows = [
    ("What is  this ?", "x"),
    ("what is this", "x"),
    ("Who are you ?", "y"),
    ("who are YOU", "x"),
    ("", "x"),
    ("?", "y"),
    ("long " * 30, "y"),
    ("<b>Where</b> is it ?", "y"),
    ("This one is in test .", "x"),
    (LONG + " x", "y"),
    ("Only in train", "y"),
]
VALIDATION: Rows = [("In validation", "x"), ("Is it in train only ?", "y"), ("This one is in test", "x")]
TEST: Rows = [("This one is in test", "x"), (LONG, "y")]
CORPUS = [
    "Hello",
    "A sentence of the corpus.",
    "a sentence of the CORPUS",
    "He said: this one is in test! And left.",
    LONG.replace(" ?", "s"),
    "Another sentence\nof the corpus.",
]


def raw_params(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text(encoding="utf-8"))
    raw["clean"].update({"maximum_characters": 120, **changes})
    return raw


def write_inputs(
    folder: Path, train: Rows, validation: Rows, test: Rows, corpus: list[str], shifted: Sequence[Sequence[str]] = ()
) -> dict[str, Path]:
    for name, rows in {"train": train, "validation": validation, "test": test}.items():
        write_table(frame_of(["text", "label"], rows), folder / "data" / f"{name}.parquet")
    write_table(frame_of(["text"], [[text] for text in corpus]), folder / "corpus" / "corpus.parquet")
    write_table(frame_of(["domain", "text", "label"], shifted), folder / "shifted" / "shifted.parquet")
    units = {unit: folder / unit for unit in ("data", "shifted", "corpus")}
    for unit in units.values():
        write_manifest(unit)
    return units


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clean:
    """Run the stage's work; return metrics and output."""
    monkeypatch.chdir(tmp_path)

    def run(
        train: Rows = TRAIN,
        validation: Rows = VALIDATION,
        test: Rows = TEST,
        corpus: list[str] = CORPUS,
        shifted: Sequence[Sequence[str]] = (),
        **changes: Any,
    ) -> tuple[dict[str, Any], Path]:
        inputs = write_inputs(tmp_path / "in", train, validation, test, corpus, shifted)
        staging = tmp_path / "out"
        staging.mkdir()
        params = parse_params(raw_params(**changes), "params.yaml")
        record = RunRecord(tmp_path / "record", {}, "")
        return run_clean(StageRun("clean", params, inputs, staging, tmp_path / "state", record)), staging

    return run


def texts(out: Path, name: str) -> list[str]:
    return pandas.read_parquet(out / name)["text"].tolist()


def reasons(out: Path) -> list[tuple[str, str, str]]:
    rejects = pandas.read_parquet(out / "rejects.parquet")
    return list(rejects[["split", "reason", "text"]].itertuples(index=False, name=None))


def test_every_row_ends_in_a_split_or_among_the_rejects(clean: Clean) -> None:
    metrics, out = clean()
    assert texts(out, "data/train.parquet") == ["What is this ?", "Where is it ?", "Only in train"]
    assert texts(out, "data/validation.parquet") == ["In validation", "Is it in train only ?"]
    assert texts(out, "data/test.parquet") == ["This one is in test", LONG]
    assert [reason for reason in reasons(out) if reason[0] != "corpus"] == [
        ("train", "empty", ""),
        ("train", "too_short", "?"),
        ("train", "too_long", "long " * 30),
        ("train", "label_conflict", "Who are you ?"),
        ("train", "label_conflict", "who are YOU"),
        ("train", "duplicate", "what is this"),
        ("train", "leak", "This one is in test ."),
        ("validation", "leak", "This one is in test"),
        ("train", "near_leak", LONG + " x"),
    ]
    assert metrics["rows"] == {
        "train": {"in": 11, "out": 3},
        "validation": {"in": 3, "out": 2},
        "test": {"in": 2, "out": 2},
    }
    assert metrics["removed"]["label_conflict"] == 2
    assert metrics["repaired"]["html"] == 1
    assert json.loads((out / "data" / "labels.json").read_text(encoding="utf-8")) == ["x", "y"]


def test_details_name_what_a_text_collided_with(clean: Clean) -> None:
    _, out = clean()
    rejects = pandas.read_parquet(out / "rejects.parquet").set_index("text")["detail"]
    assert rejects["what is this"] == "train (x): What is this ?"
    assert rejects["This one is in test ."] == "test (x): This one is in test"
    assert rejects["who are YOU"] == "the same text is also labelled y"


def test_the_corpus_gives_nothing_away(clean: Clean) -> None:
    metrics, out = clean()
    assert texts(out, "corpus/corpus.parquet") == ["A sentence of the corpus.", "Another sentence of the corpus."]
    assert [reason for reason in reasons(out) if reason[0] == "corpus"] == [
        ("corpus", "too_short", "Hello"),
        ("corpus", "duplicate", "a sentence of the CORPUS"),
        ("corpus", "leak", "He said: this one is in test! And left."),
        ("corpus", "near_leak", LONG.replace(" ?", "s")),
    ]
    assert metrics["corpus"]["in"] == 6
    assert metrics["corpus"]["out"] == 2


def test_rules_are_counted_with_examples(clean: Clean) -> None:
    _, out = clean()
    rules = pandas.read_csv(out / "rules.csv", keep_default_na=False).set_index(["rule", "split"])
    assert rules.loc[("html", "train"), "count"] == 1
    assert rules.loc[("html", "train"), "example_before"] == "<b>Where</b> is it ?"
    assert rules.loc[("html", "train"), "example_after_or_detail"] == "Where is it ?"
    assert rules.loc[("duplicate", "test"), "count"] == 0
    assert ("label_conflict", "corpus") not in rules.index


def test_near_duplicates_can_be_kept(clean: Clean) -> None:
    metrics, out = clean(near_duplicates=None)
    assert LONG + " x" in texts(out, "data/train.parquet")
    assert metrics["corpus"]["removed"]["near_leak"] == 0


def test_further_columns_travel_with_their_texts() -> None:
    rows = {
        "train": [["This is one", "x", "de"], ["this is ONE", "x", "fr"], ["<i>Two</i>", "y", ""]],
        "validation": [["Three of them", "x", "it"]],
        "test": [["Four of them", "y", "at"]],
    }
    frames = {split: frame_of(["text", "label", "country"], found) for split, found in rows.items()}
    cleaned = clean_labelled(frames, parse_params(raw_params(), "params.yaml").clean, read_corrections(None), Ledger())
    assert cleaned["train"].to_numpy().tolist() == [["This is one", "x", "de"], ["Two", "y", ""]]
    assert cleaned["test"]["country"].tolist() == ["at"]


def test_an_empty_corpus_stays_empty(clean: Clean) -> None:
    metrics, out = clean(corpus=[])
    assert metrics["corpus"]["out"] == 0
    assert texts(out, "corpus/corpus.parquet") == []


def test_other_domains_are_repaired_and_hold_nothing_of_the_task(clean: Clean) -> None:
    rows = [
        ("tweets", "<b>Great</b>  film", "x"),
        ("tweets", "great FILM!", "y"),
        ("news", "Great film", "x"),
        ("news", "this one is in TEST", "x"),
        ("news", "only in train!", "y"),
        ("news", "", "y"),
        ("news", "?", "y"),
        ("news", "long " * 30, "y"),
    ]
    metrics, out = clean(shifted=rows)
    kept = pandas.read_parquet(out / "shifted" / "shifted.parquet")
    assert kept.to_numpy().tolist() == [["tweets", "Great film", "x"], ["news", "Great film", "x"]]
    assert metrics["shifted"]["removed"] == {"empty": 1, "too_short": 1, "too_long": 1, "duplicate": 1, "leak": 2}
    assert (metrics["shifted"]["in"], metrics["shifted"]["out"]) == (8, 2)
    assert metrics["shifted"]["repaired"]["html"] == 1
    assert [reason for split, reason, _ in reasons(out) if split == "shifted"] == [
        "duplicate", "leak", "leak", "empty", "too_short", "too_long",
    ]  # fmt: skip


def test_cleaning_what_is_clean_removes_nothing(clean: Clean, tmp_path: Path) -> None:
    _, out = clean()
    frames = {name: pandas.read_parquet(out / "data" / f"{name}.parquet") for name in ("train", "validation", "test")}
    rows = {name: list(frame.itertuples(index=False, name=None)) for name, frame in frames.items()}
    corpus = texts(out, "corpus/corpus.parquet")
    out.rename(tmp_path / "first")
    metrics, _ = clean(rows["train"], rows["validation"], rows["test"], corpus)
    assert not any(metrics["removed"].values())
    assert not any(metrics["repaired"].values())
    assert metrics["corpus"]["in"] == metrics["corpus"]["out"]


def test_a_vanished_class_is_refused(clean: Clean) -> None:
    with pytest.raises(UserError, match=r"no text of class 'y' is left in train; removed were 2 label_conflict"):
        clean([("a b c", "x"), ("same text", "x"), ("same text", "y")], [("d e f", "x")], [("g h i", "x")], [])


def test_an_empty_split_is_refused(clean: Clean) -> None:
    with pytest.raises(UserError, match=r"nothing is left of validation, which had 1 rows; removed were 1 leak"):
        clean([("a b c", "x"), ("d e f", "y")], [("g h i", "x")], [("G H I", "x")], [])


def run_command(project: Path) -> dict[str, Any]:
    own = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    inputs = [word for unit in ("data", "shifted", "corpus") for word in (f"--{unit}", f"in/{unit}")]
    command = [sys.executable, "-m", "stages.clean", *inputs, "--out", "out/clean"]
    done = subprocess.run(command, cwd=project, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = json.loads((project / "out" / "clean" / "manifest.json").read_text(encoding="utf-8"))
    return {name: entry for name, entry in manifest["files"].items() if name != "measured.json"}


def test_the_command_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in", TRAIN, VALIDATION, TEST, CORPUS)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw_params()), encoding="utf-8")
    first = run_command(tmp_path)
    assert run_command(tmp_path) == first
    assert {"rules.csv", "rejects.parquet", "data/labels.json", "corpus/manifest.json"} <= set(first)

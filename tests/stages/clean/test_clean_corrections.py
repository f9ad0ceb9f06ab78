from __future__ import annotations

from pathlib import Path

import pytest

from stages.clean.corrections import apply_corrections, read_corrections
from stages.clean.ledger import RELABELLED, Ledger
from stages.clean.rows import Row
from stages.core.artifacts import file_sha256, text_sha256
from stages.core.errors import UserError
from stages.core.texts import comparable

HEADER = "key,text,correction,note,reviewer\n"


def row(text: str, label: str, split: str = "train") -> Row:
    return Row(split, label, f" {text}", text, comparable(text), ())


ROWS = [row("Who is he?", "HUM"), row("who is HE", "HUM"), row("Where?", "LOC"), row("Why?", "DESC", "test")]


def correct(path: Path, *lines: tuple[str, str], rows: list[Row] = ROWS) -> tuple[list[Row], Ledger]:
    body = "".join(f"{text_sha256(text)},{text},{value},because,Ada\n" for text, value in lines)
    path.write_text(HEADER + body, encoding="utf-8")
    ledger = Ledger()
    return apply_corrections(rows, read_corrections(str(path)), ledger), ledger


def test_all_copies_of_a_text_get_the_new_label_and_each_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "filled.csv"
    rows, ledger = correct(path, ("Who is he?", "DESC"), ("Where?", ""))
    assert [entry.label for entry in rows] == ["DESC", "DESC", "LOC", "DESC"]
    noted = ledger.corrections()
    assert noted["text"].tolist() == ["Who is he?", "who is HE"]
    assert set(noted["sha256"]) == {file_sha256(path)}
    assert noted.loc[0, ["split", "before", "after", "reviewer", "note"]].tolist() == [
        "train", "HUM", "DESC", "Ada", "because",
    ]  # fmt: skip
    assert ledger.totals((RELABELLED,), ("train", "test")) == {RELABELLED: 2}


def test_dropped_texts_go_to_the_rejects_with_who_and_why(tmp_path: Path) -> None:
    rows, ledger = correct(tmp_path / "filled.csv", ("Why?", "drop"))
    assert [entry.text for entry in rows] == ["Who is he?", "who is HE", "Where?"]
    rejects = ledger.rejects()
    assert rejects[["text", "split", "reason", "detail"]].to_numpy().tolist() == [
        [" Why?", "test", "dropped", "dropped on review: Ada, because"]
    ]


def test_a_label_called_drop_is_a_label(tmp_path: Path) -> None:
    rows, _ = correct(tmp_path / "filled.csv", ("a", "drop"), rows=[row("a", "keep"), row("b", "drop")])
    assert [entry.label for entry in rows] == ["drop", "drop"]


def test_the_label_it_has_changes_nothing(tmp_path: Path) -> None:
    rows, ledger = correct(tmp_path / "filled.csv", ("Where?", "LOC"))
    assert rows == ROWS
    assert ledger.corrections().empty


def test_every_mistake_is_told_in_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "filled.csv"
    lines = [("Nowhere?", "LOC"), ("Where?", "lok"), ("Who is he?", "LOC"), ("who is HE", "DESC")]
    with pytest.raises(UserError) as caught:
        correct(path, *lines)
    told = str(caught.value).split("\n")
    assert len(told) == 3
    assert told[0].startswith(f"{path}: row 1: no text has the key {text_sha256('Nowhere?')[:12]!r} ('Nowhere?')")
    assert told[1] == f"{path}: row 2: correction 'lok' is no label; write one of DESC, HUM, LOC, or drop"
    assert told[2].startswith(f"{path}: row 4: correction 'DESC' contradicts 'LOC' of row 3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("key,text\n1,a\n", "has no column correction"),
        ("key;text;correction\n1;a;x\n", "has no column key"),
    ],
)
def test_a_file_that_is_no_review_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "filled.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_corrections(str(path))


def test_no_file_corrects_nothing() -> None:
    assert apply_corrections(ROWS, read_corrections(None), Ledger()) == ROWS

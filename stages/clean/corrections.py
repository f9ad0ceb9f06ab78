"""Corrections by people: a filled-in `review.csv`, checked whole before any of it counts.

A row names its text by the SHA-256 sum of the repaired text, in the column `key`, so that nothing a spreadsheet does to
the text itself matters. Its `correction` is a label of the task, or `drop` (where that is a label, it means the label);
an empty one says nothing. All copies of a text are corrected alike, or the copies would contradict each other and be
removed as label conflicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.clean.ledger import Ledger
from stages.clean.rows import Row
from stages.core.artifacts import file_sha256, text_sha256
from stages.core.errors import UserError
from stages.core.tables import read_table

DROP = "drop"
_REQUIRED = ("key", "correction")
_SHOWN = 60


@dataclass(frozen=True)
class Correction:
    """What a reviewer said about a text."""

    where: str
    """File and row, for messages."""
    key: str
    """SHA-256 of the repaired text."""
    value: str
    """A label, or `drop`."""
    reviewer: str
    note: str
    shown: str
    """The text as the file has it."""


@dataclass(frozen=True)
class Corrections:
    """A filled-in file."""

    file: str
    sha256: str
    entries: Sequence[Correction]
    """Rows with a correction, in the order of the file."""


def read_corrections(path: str | None) -> Corrections:
    """Read a filled-in review; None gives no corrections.

    Raises:
        UserError: if the file cannot be read or lacks a column.
    """
    if path is None:
        return Corrections("", "", [])
    frame = read_table(Path(path), None, "utf-8")
    missing = [name for name in _REQUIRED if name not in frame]
    if missing:
        raise UserError(
            f"{path}: has no column {missing[0]}; "
            "fill in a copy of artifacts/review/review.csv, with columns divided by commas"
        )
    cells = [{name: str(value or "").strip() for name, value in row.items()} for row in frame.to_dict("records")]
    entries = [
        Correction(
            where=f"{path}: row {number}",
            key=row["key"],
            value=row["correction"],
            reviewer=row.get("reviewer", ""),
            note=row.get("note", ""),
            shown=row.get("text", "")[:_SHOWN],
        )
        for number, row in enumerate(cells, start=1)
        if row["correction"]
    ]
    return Corrections(path, file_sha256(Path(path)), entries)


def apply_corrections(rows: Sequence[Row], corrections: Corrections, ledger: Ledger) -> list[Row]:
    """Give texts the labels that reviewers gave them, and leave out those to be dropped; the ledger tells of both.

    Args:
        rows: of all splits, repaired.
        corrections: of a filled-in file.
        ledger: notes what changed.

    Raises:
        UserError: with a line for each unknown text, unknown label and contradiction, all together.
    """
    labels = {row.label for row in rows}
    forms = {text_sha256(row.text): row.key for row in rows} if corrections.entries else {}
    problems = [*_unknown(corrections, labels, forms), *_contradictions(corrections, forms)]
    if problems:
        raise UserError("\n".join(problems))
    by_form = {forms[entry.key]: entry for entry in reversed(corrections.entries)}
    kept = [_corrected(row, by_form.get(row.key), labels, corrections, ledger) for row in rows]
    return [row for row in kept if row is not None]


def _unknown(corrections: Corrections, labels: set[str], forms: Mapping[str, str]) -> Iterator[str]:
    for entry in corrections.entries:
        if entry.key not in forms:
            yield (
                f"{entry.where}: no text has the key {entry.key[:12]!r} ({entry.shown!r}); "
                "leave the column key as it was, and remove rows of texts that are gone"
            )
        if entry.value not in labels and entry.value != DROP:
            yield (
                f"{entry.where}: correction {entry.value!r} is no label; write one of {', '.join(sorted(labels))}, "
                f"or {DROP}"
            )


def _contradictions(corrections: Corrections, forms: Mapping[str, str]) -> Iterator[str]:
    first: dict[str, Correction] = {}
    for entry in corrections.entries:
        earlier = first.setdefault(forms.get(entry.key, entry.key), entry)
        if earlier.value != entry.value:
            yield (
                f"{entry.where}: correction {entry.value!r} contradicts {earlier.value!r} of "
                f"{earlier.where.rpartition(': ')[2]}, which is about the same text; keep one"
            )


def _corrected(
    row: Row, entry: Correction | None, labels: set[str], corrections: Corrections, ledger: Ledger
) -> Row | None:
    if entry is None or entry.value == row.label:
        return row
    drops = entry.value == DROP and DROP not in labels
    ledger.corrected(
        row.split,
        text=row.text,
        before=row.label,
        after=DROP if drops else entry.value,
        key=entry.key,
        reviewer=entry.reviewer,
        note=entry.note,
        file=corrections.file,
        sha256=corrections.sha256,
    )
    if drops:
        told = ", ".join(part for part in (entry.reviewer, entry.note) if part)
        ledger.rejected("dropped", row.split, row.original, row.label, f"dropped on review{told and f': {told}'}")
        return None
    ledger.relabelled(row.split, row.text, row.label, entry.value)
    return row.relabelled(entry.value)

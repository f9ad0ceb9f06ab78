"""Cleaning of the labelled splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import pandas

from stages.clean.corrections import Corrections, apply_corrections
from stages.clean.duplicates import near_duplicates
from stages.clean.ledger import REMOVALS, Ledger
from stages.clean.rows import Row
from stages.clean.rules import repair, repairs
from stages.core.errors import UserError
from stages.core.observe.progress import track
from stages.core.params import CleanParams, NearDuplicateParams
from stages.core.tables import frame_of
from stages.core.texts import comparable

SPLITS = ("train", "validation", "test")
_KEPT_FIRST = ("test", "validation", "train")


def clean_labelled(
    frames: Mapping[str, pandas.DataFrame], params: CleanParams, corrections: Corrections, ledger: Ledger
) -> dict[str, pandas.DataFrame]:
    """Repair, correct and sift the splits; whatever is changed or removed goes to the ledger.

    Args:
        frames: train, validation and test with text, label, and maybe further columns that all of them have.
        params: which rules, and how strict.
        corrections: of reviewers.
        ledger: notes repairs, corrections and rejects.

    Returns:
        the cleaned splits, rows in their first order.

    Raises:
        UserError: if a correction cannot be applied, nothing is left of a split, or a class vanished from train.
    """
    rows = [row for split in SPLITS for row in _repaired(frames[split], split, params, ledger)]
    rows = apply_corrections(rows, corrections, ledger)
    rows = _without_bad_lengths(rows, params, ledger)
    rows = _without_conflicts(rows, ledger)
    rows = _without_copies(rows, ledger)
    if params.near_duplicates is not None:
        rows = _without_near_duplicates(rows, params.near_duplicates, ledger)
    columns = ["text", "label", *_further_columns(frames["train"])]
    cleaned = {
        split: frame_of(columns, [[row.text, row.label, *row.others] for row in rows if row.split == split])
        for split in SPLITS
    }
    _check_enough_left(frames, cleaned, ledger)
    return cleaned


def _further_columns(frame: pandas.DataFrame) -> list[str]:
    return [name for name in frame.columns if name not in ("text", "label")]


def _repaired(frame: pandas.DataFrame, split: str, params: CleanParams, ledger: Ledger) -> Iterator[Row]:
    rules = repairs(params)

    def note(rule: str, before: str, after: str) -> None:
        ledger.repaired(rule, split, before, after)

    columns = [frame[name].tolist() for name in ("text", "label", *_further_columns(frame))]
    for original, label, *others in track(list(zip(*columns, strict=True)), f"clean {split}"):
        text = repair(original, rules, note)
        yield Row(split, label, original, text, comparable(text), tuple(others))


def _without_bad_lengths(rows: list[Row], params: CleanParams, ledger: Ledger) -> list[Row]:
    kept = []
    for row in rows:
        length = len(row.text)
        if length == 0:
            _reject("empty", row, "nothing is left of the text", ledger)
        elif length < params.minimum_characters:
            _reject("too_short", row, f"{length} characters, at least {params.minimum_characters} wanted", ledger)
        elif length > params.maximum_characters:
            _reject("too_long", row, f"{length} characters, at most {params.maximum_characters} wanted", ledger)
        else:
            kept.append(row)
    return kept


def _without_conflicts(rows: list[Row], ledger: Ledger) -> list[Row]:
    labels = defaultdict(set)
    for row in rows:
        labels[row.key].add(row.label)
    kept = []
    for row in rows:
        others = sorted(labels[row.key] - {row.label})
        if others:
            _reject("label_conflict", row, f"the same text is also labelled {', '.join(others)}", ledger)
        else:
            kept.append(row)
    return kept


def _without_copies(rows: list[Row], ledger: Ledger) -> list[Row]:
    """Keep the first copy in the split that goes first."""
    first: dict[str, Row] = {}
    for row in _by_preference(rows):
        first.setdefault(row.key, row)
    kept = []
    for row in rows:
        original = first[row.key]
        if row is original:
            kept.append(row)
        else:
            _reject("duplicate" if row.split == original.split else "leak", row, _names(original), ledger)
    return kept


def _without_near_duplicates(rows: list[Row], params: NearDuplicateParams, ledger: Ledger) -> list[Row]:
    ordered = _by_preference(rows)
    found = near_duplicates([row.key for row in ordered], params)
    originals = {id(ordered[number]): ordered[original] for number, original in found.items()}
    kept = []
    for row in rows:
        other = originals.get(id(row))
        if other is None:
            kept.append(row)
        else:
            rule = "near_duplicate" if row.split == other.split else "near_leak"
            _reject(rule, row, _names(other), ledger)
    return kept


def _by_preference(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _KEPT_FIRST.index(row.split))


def _reject(rule: str, row: Row, detail: str, ledger: Ledger) -> None:
    ledger.rejected(rule, row.split, row.original, row.label, detail)


def _names(row: Row) -> str:
    return f"{row.split} ({row.label}): {row.text}"


def _check_enough_left(
    before: Mapping[str, pandas.DataFrame], after: Mapping[str, pandas.DataFrame], ledger: Ledger
) -> None:
    removed = ", ".join(f"{count} {rule}" for rule, count in ledger.totals(REMOVALS, SPLITS).items() if count)
    hint = f"removed were {removed or 'none'}; loosen the rules in clean, or add texts"
    for split in SPLITS:
        if after[split].empty:
            raise UserError(f"nothing is left of {split}, which had {len(before[split])} rows; {hint}")
    left = set(after["train"]["label"])
    vanished = sorted({label for frame in before.values() for label in frame["label"]} - left)
    if vanished:
        raise UserError(f"no text of class {vanished[0]!r} is left in train; {hint}")

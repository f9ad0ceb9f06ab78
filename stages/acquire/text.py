"""Tables of any shape become frames with the columns text and label, and those that slices are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import pandas

from stages.core.errors import UserError
from stages.core.params import LabelBin, LabelledParams
from stages.core.tables import frame_of

_FEWEST_CLASSES = 2


def labelled(
    frame: pandas.DataFrame, params: LabelledParams, slice_columns: Sequence[str], where: str
) -> tuple[pandas.DataFrame, int]:
    """Take text and label out of a table.

    Blank and missing texts stay, as empty strings, for `clean` to reject and count.

    Args:
        frame: the table.
        params: columns, bins and names.
        slice_columns: that travel with the texts.
        where: names the table in messages.

    Returns:
        frame with the columns text, label and the slice columns, all of them strings, and the number of rows
        left out because their score is in no bin.

    Raises:
        UserError: if a column is missing, there are no rows, or a label or text is not what it should be.
    """
    texts = [text_of(value, f"{where}: row {row}") for row, value in _column(frame, "text_column", params, where)]
    raw = _column(frame, "label_column", params, where)
    if not raw:
        raise UserError(f"{where}: has no rows; add labelled texts")
    if params.label_bins is None:
        labels: list[str | None] = [_label(value, f"{where}: row {row}", params.label_column) for row, value in raw]
    else:
        labels = [_bin(value, params.label_bins, f"{where}: row {row}", params.label_column) for row, value in raw]
    if params.label_names is not None:
        labels = [_renamed(label, params.label_names, where) for label in labels]
    slices = [_slice_column(frame, name, where) for name in slice_columns]
    rows = [list(row) for row in zip(texts, labels, *slices, strict=True) if row[1] is not None]
    return frame_of(["text", "label", *slice_columns], rows), len(raw) - len(rows)


def check_classes(given: Mapping[str, pandas.DataFrame], where: str) -> None:
    """Check that there is something to learn, and nothing in the given splits that could not be learned.

    Raises:
        UserError: if a split is empty, there is only one class, or a label appears outside train alone.
    """
    for split, frame in given.items():
        if frame.empty:
            raise UserError(f"{where}: {split} has no rows with a label; add some, or check label_bins")
    known = set(given["train"]["label"])
    for split, frame in given.items():
        unseen = sorted(set(frame["label"]) - known)
        if unseen:
            raise UserError(
                f"{where}: {split} has the label {unseen[0]!r}, which train never shows; "
                f"train has {', '.join(sorted(known))}"
            )
    if len(known) < _FEWEST_CLASSES:
        raise UserError(
            f"{where}: every row has the label {min(known)!r}; at least {_FEWEST_CLASSES} classes are needed"
        )


def text_of(value: Any, where: str) -> str:
    """Return a cell as text; what is missing is an empty one.

    Raises:
        UserError: if the cell holds a list, a mapping or bytes.
    """
    if isinstance(value, str):
        return value
    if _is_missing(value):
        return ""
    if isinstance(value, Mapping | Sequence | numpy.ndarray):
        raise UserError(f"{where}: holds {type(value).__name__} where a text was expected; choose another column")
    return str(value)


def column_of(frame: pandas.DataFrame, name: str, where: str, option: str) -> list[Any]:
    """Return the cells of a column.

    Raises:
        UserError: if there is no such column, listing those there are.
    """
    if name not in frame.columns:
        there = ", ".join(repr(column) for column in frame.columns)
        raise UserError(f"{where}: has no column {name!r}; set {option} to one of {there}")
    return list(frame[name].tolist())


def _column(frame: pandas.DataFrame, option: str, params: LabelledParams, where: str) -> list[tuple[int, Any]]:
    """Cells with the number of their row, counted from 1 without the header."""
    return list(enumerate(column_of(frame, getattr(params, option), where, option), start=1))


def _slice_column(frame: pandas.DataFrame, name: str, where: str) -> list[str]:
    """Cells of a column that slices are made of, as text; what is missing is an empty one."""
    cells = column_of(frame, name, where, "slice_columns")
    return [_plain(value, f"{where}: row {row}").strip() for row, value in enumerate(cells, start=1)]


def _plain(value: Any, where: str) -> str:
    # Whole numbers beside missing ones are stored as floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text_of(value, where)


def _label(value: Any, where: str, column: str) -> str:
    if _is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: has no label in column {column!r}; label the row or remove it")
    return _plain(value, where).strip()


def _bin(value: Any, bins: Sequence[LabelBin], where: str, column: str) -> str | None:
    """Return the label of the first bin that holds a score; None for a missing score and one between the bins."""
    if _is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r} in column {column!r} is not a number, which label_bins needs") from None
    return next((own.label for own in bins if own.holds(score)), None)


def _renamed(label: str | None, names: Mapping[str, str], where: str) -> str | None:
    if label is None:
        return None
    if label not in names:
        raise UserError(f"{where}: label {label!r} is not in label_names, which has {', '.join(names)}; add it")
    return names[label]


def _is_missing(value: Any) -> bool:
    return (
        value is None or value is pandas.NA or value is pandas.NaT or (isinstance(value, float) and math.isnan(value))
    )

"""Reads what the other stages left behind; every part of the page takes what it needs from here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas

from stages.core.artifacts import read_json
from stages.core.errors import UserError
from stages.core.ladder import CHAIN, VARIANTS, LadderRow, ladder_rows
from stages.core.stage import METRICS

Inputs = Mapping[str, Path]
"""Folders by role, as in `dvc.yaml`: the stages, `evaluate@<variant>` and the like."""


def read_evaluations(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Read the metrics of `evaluate` by variant, the chain first.

    Raises:
        UserError: if a file is missing or malformed.
    """
    return {name: read_metrics(inputs, f"evaluate@{name}") for name in VARIANTS if f"evaluate@{name}" in inputs}


def read_ladder(inputs: Inputs) -> list[LadderRow]:
    """Compute the ladder of what was evaluated.

    Raises:
        UserError: if nothing was, or an evaluation lacks a value.
    """
    return ladder_rows(read_evaluations(inputs))


def final_variant(inputs: Inputs) -> str:
    """Return the last variant of the chain that was evaluated, which is what gets deployed."""
    return next(name for name in reversed(CHAIN) if f"evaluate@{name}" in inputs)


def read_metrics(inputs: Inputs, role: str) -> dict[str, Any]:
    """Read the metrics of one stage.

    Raises:
        UserError: if the file is missing or malformed.
    """
    found: dict[str, Any] = read_json(inputs[role] / METRICS)
    return found


def read_mixed(path: Path, **options: Any) -> pandas.DataFrame:
    """Read a table whose columns are of several kinds, with the options of `pandas.read_csv`.

    Raises:
        UserError: if the file is missing or is no table.
    """
    try:
        table: pandas.DataFrame = pandas.read_csv(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a table: {error}; remove its folder and run `dvc repro`") from None
    return table


def read_table(path: Path, *columns: str) -> pandas.DataFrame:
    """Read a table as text, so that a class called 01 or NA stays what it is.

    Raises:
        UserError: if the file is missing, is no table or lacks one of the columns.
    """
    table = read_mixed(path, dtype=str, keep_default_na=False)
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; its columns: {', '.join(map(str, table))}")
    return table


def read_numbers(path: Path, *columns: str) -> pandas.DataFrame:
    """Read a table whose cells are numbers or empty.

    Raises:
        UserError: as `read_table`.
    """
    numbers: pandas.DataFrame = read_table(path, *columns).apply(pandas.to_numeric, errors="coerce")
    return numbers

"""Reads what the other stages left behind into one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from stages.core.artifacts import MANIFEST, digest, read_json
from stages.core.errors import UserError
from stages.core.ladder import CHAIN, VARIANTS, LadderRow, ladder_rows
from stages.core.stage import HISTORY, MEASURED, METRICS

TRAINED = ("pretrain", "finetune", "distill", "prune")
"""Stages that may train, in order."""
EXAMPLES = ("example_before", "example_after_or_detail")
"""Columns of the cleaning rules: a text as it came, and what became of it or what it collided with."""
_UNITS = {
    "acquire": ("data", "corpus", "checkpoint"),
    "clean": ("data", "corpus"),
    "tokenize": ("tokenizer", "data", "blocks"),
    "pretrain": ("model",),
    **dict.fromkeys(CHAIN, ("model",)),
}


@dataclass(frozen=True)
class Link:
    """One unit on the way from the source to the final model."""

    stage: str
    unit: str
    digest: str
    """SHA-256 of the unit's manifest."""


@dataclass(frozen=True)
class Cost:
    """What a stage spent."""

    stage: str
    wall_seconds: float
    peak_memory_mb: float
    energy_joules: float | None


@dataclass(frozen=True)
class Findings:
    """Everything the report tells."""

    rows: list[LadderRow]
    evaluations: dict[str, dict[str, Any]]
    """Metrics of `evaluate` by variant, in the order of the chain."""
    final: str
    """The last variant of the chain, which is what gets deployed."""
    metrics: dict[str, dict[str, Any]]
    """Metrics of the other stages."""
    histories: dict[str, pandas.DataFrame]
    """Curves of the stages that trained, a row per step."""
    confusion: pandas.DataFrame
    """Texts counted by actual and predicted class, of the final variant."""
    calibration: pandas.DataFrame
    """Columns confidence, accuracy, count; of the final variant."""
    trade_off: pandas.DataFrame
    """Columns passed_on, difference, low, high, cost; of the cascade on validation texts, a row per threshold."""
    lengths: pandas.DataFrame
    """Columns split, length, count."""
    rules: pandas.DataFrame
    """Columns rule, split, count, example_before, example_after_or_detail."""
    deploy_check: dict[str, Any]
    machine: dict[str, Any]
    """Hardware and package versions of the machine that was measured."""
    provenance: dict[str, Any]
    lineage: list[Link]
    costs: list[Cost]


def read_findings(inputs: Mapping[str, Path]) -> Findings:
    """Read all inputs of the report.

    Args:
        inputs: folders by role, as in `dvc.yaml`: the stages, and `evaluate@<variant>`.

    Raises:
        UserError: if a file is missing or malformed.
    """
    variants = [name for name in VARIANTS if f"evaluate@{name}" in inputs]
    evaluations = {name: read_json(inputs[f"evaluate@{name}"] / METRICS) for name in variants}
    rows = ladder_rows(evaluations)
    final = next(name for name in reversed(CHAIN) if name in variants)
    last = inputs[f"evaluate@{final}"]
    described = [name for name in ("clean", "tokenize", *TRAINED, "quantize", "cascade") if name in inputs]
    return Findings(
        rows=rows,
        evaluations=evaluations,
        final=final,
        metrics={name: read_json(inputs[name] / METRICS) for name in described},
        histories={name: _history(inputs[name] / HISTORY) for name in TRAINED if (inputs[name] / HISTORY).exists()},
        confusion=_confusion(last / "confusion.csv", list(evaluations[final]["per_class"])),
        calibration=_numbers(last / "calibration.csv", "confidence", "accuracy", "count"),
        trade_off=_numbers(inputs["cascade"] / "trade_off.csv", "passed_on", "difference", "low", "high", "cost"),
        lengths=_lengths(inputs["tokenize"] / "lengths.csv"),
        rules=_table(inputs["clean"] / "rules.csv", "rule", "split", "count", *EXAMPLES).astype({"count": int}),
        deploy_check=read_json(inputs["deploy_check"] / METRICS),
        machine=read_json(inputs["deploy_check"] / "details.json")["inventory"],
        provenance=read_json(inputs["acquire"] / "provenance.json"),
        lineage=_lineage(inputs),
        costs=[_cost(role, folder) for role, folder in inputs.items()],
    )


def _table(path: Path, *columns: str) -> pandas.DataFrame:
    """Read a table as text, so that a class called 01 or NA stays what it is."""
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a table: {error}; remove its folder and run `dvc repro`") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; its columns: {', '.join(map(str, table))}")
    return table


def _numbers(path: Path, *columns: str) -> pandas.DataFrame:
    """Read a table whose cells are numbers or empty."""
    numbers: pandas.DataFrame = _table(path, *columns).apply(pandas.to_numeric, errors="coerce")
    return numbers


def _history(path: Path) -> pandas.DataFrame:
    """Steps that start again, as in a second round of pruning, go on counting."""
    table = _numbers(path, "step", "train_loss")
    restart = table["step"].shift(fill_value=0).where(table["step"].diff() < 0, 0)
    return table.assign(step=table["step"] + restart.cumsum())


def _lengths(path: Path) -> pandas.DataFrame:
    return _table(path, "split", "length", "count").astype({"length": int, "count": int})


def _confusion(path: Path, labels: list[str]) -> pandas.DataFrame:
    table = _table(path, "actual", "predicted")
    counts = table.value_counts(["actual", "predicted"]).unstack(fill_value=0)
    return counts.reindex(index=labels, columns=labels, fill_value=0)


def _lineage(inputs: Mapping[str, Path]) -> list[Link]:
    # A room need not hand on every unit: there may be no corpus.
    units = [
        Link(stage, unit, digest(inputs[stage] / unit))
        for stage, units in _UNITS.items()
        for unit in units
        if stage in inputs and (inputs[stage] / unit / MANIFEST).exists()
    ]
    # The exported models are no input of this stage; those who measured them noted what they were given.
    exported = [
        Link(f"export@{name}", "model", read_json(inputs[f"evaluate@{name}"] / MEASURED)["inputs"]["model"])
        for name in CHAIN
        if f"evaluate@{name}" in inputs
    ]
    return [*units, *exported]


def _cost(role: str, folder: Path) -> Cost:
    measured = read_json(folder / MEASURED)
    return Cost(role, measured["wall_seconds"], measured["peak_memory_mb"], measured["energy_joules"])

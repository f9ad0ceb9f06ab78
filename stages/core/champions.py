"""The table of earlier champions that the stage `history` writes and the report reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import pandas

from stages.core.artifacts import text_sha256
from stages.core.errors import UserError
from stages.core.tables import frame_of, read_table, write_table

CHAMPIONS = "champions.csv"


@dataclass(frozen=True)
class Champion:
    """A model that was the champion of the registry once, or is."""

    version: int
    """In the registry."""
    day: date
    """On which it was registered, UTC."""
    metric: str
    """Which quality `quality` is, such as accuracy."""
    quality: float
    texts_per_second: float
    speedup: float
    """Throughput over that of the fair PyTorch baseline, timed in the same run."""
    machine: str
    """Processor that it was timed on."""
    test_split: str
    """Sum of the texts and labels that `quality` was measured on."""


def digest_of_test_split(predictions: Path) -> str:
    """Sum up the texts and labels of an evaluation, whatever was predicted for them."""
    frame = pandas.read_parquet(predictions, columns=["text", "label"])
    return text_sha256(str(frame.to_json(orient="values")))


def write_champions(path: Path, champions: Sequence[Champion]) -> None:
    """Write the table, a header alone where there are none."""
    columns = [field.name for field in fields(Champion)]
    write_table(frame_of(columns, [list(asdict(champion).values()) for champion in champions]), path)


def read_champions(path: Path) -> list[Champion]:
    """Read the table.

    Raises:
        UserError: if it is missing or is not one of `write_champions`.
    """
    frame: pandas.DataFrame = read_table(path, "csv", "utf-8")
    try:
        return [
            Champion(
                version=int(row["version"]),
                day=date.fromisoformat(row["day"]),
                metric=row["metric"],
                quality=float(row["quality"]),
                texts_per_second=float(row["texts_per_second"]),
                speedup=float(row["speedup"]),
                machine=row["machine"],
                test_split=row["test_split"],
            )
            for row in frame.to_dict("records")
        ]
    except (KeyError, ValueError) as problem:
        raise UserError(f"{path}: is not a table of champions ({problem}); run `dvc repro history`") from None

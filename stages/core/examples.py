"""Tokenized examples on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy
import pyarrow.parquet

from stages.core.artifacts import read_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """Texts of one split as tokens."""

    texts: list[str]
    input_ids: list[list[int]]
    labels: numpy.ndarray
    """Class indices, int64 [n]; -1 marks a text without a label."""

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.input_ids)

    def select(self, indices: Sequence[int]) -> Examples:
        """Take some of the examples."""
        return Examples(
            [self.texts[i] for i in indices], [self.input_ids[i] for i in indices], self.labels[list(indices)]
        )


def load_examples(data: Path, split: str) -> Examples:
    """Read a split of the tokenize stage."""
    table = load_dataset(data / f"{split}.parquet").with_format("arrow")[:]
    labels = table["label"].to_numpy().astype(numpy.int64)
    return Examples(table["text"].to_pylist(), table["input_ids"].to_pylist(), labels)


def load_dataset(path: Path) -> datasets.Dataset:
    """Open a Parquet file as a dataset, without a copy in a cache elsewhere."""
    return datasets.Dataset(pyarrow.parquet.read_table(path))


def load_labels(data: Path) -> list[str]:
    """Names of the classes, by index."""
    return list(read_json(data / "labels.json"))


def load_pad_id(data: Path) -> int:
    """Token id that fills short texts."""
    return int(read_json(data / "tokens.json")["pad_id"])


def load_maximum_length(data: Path) -> int:
    """Tokens per text at most."""
    return int(read_json(data / "tokens.json")["maximum_length"])


def sample(examples: Examples, count: int, seed: int) -> Examples:
    """Draw at most `count` examples without replacement."""
    generator = numpy.random.default_rng(seed)
    chosen = generator.permutation(len(examples))[:count]
    return examples.select(sorted(chosen.tolist()))

"""Tokenized examples on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy
import pyarrow.parquet
from tokenizers import Tokenizer

from stages.core.artifacts import file_sha256, read_json
from stages.core.encoding import TOKENIZER_FILE, encode, read_tokenizer
from stages.core.errors import UserError

SPLITS = ("train", "validation", "test")
_OWN_COLUMNS = ("text", "label", "input_ids")


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


def load_examples(data: Path, split: str, checkpoint: Path | None = None) -> Examples:
    """Read a split of the tokenize stage.

    Args:
        data: of the tokenize stage.
        split: which.
        checkpoint: folder of the model that will read the tokens. Where its vocabulary was trimmed, the texts are
            encoded again with its tokenizer. None gives the tokens as they are on disk.
    """
    table = load_dataset(data / f"{split}.parquet").with_format("arrow")[:]
    labels = table["label"].to_numpy().astype(numpy.int64)
    texts = table["text"].to_pylist()
    if checkpoint is None or _same_tokenizer(data, checkpoint):
        return Examples(texts, table["input_ids"].to_pylist(), labels)
    return Examples(texts, encode(read_tokenizer(checkpoint, load_maximum_length(data)), texts), labels)


def load_dataset(path: Path) -> datasets.Dataset:
    """Open a Parquet file as a dataset, without a copy in a cache elsewhere."""
    return datasets.Dataset(pyarrow.parquet.read_table(path))


def load_slice_columns(data: Path, split: str) -> dict[str, list[str]]:
    """Read what the user's data says of each text of a split beside its label, by the name of the column."""
    dataset = load_dataset(data / f"{split}.parquet")
    return {name: list(dataset[name]) for name in dataset.column_names if name not in _OWN_COLUMNS}


def load_labels(data: Path) -> list[str]:
    """Names of the classes, by index."""
    return list(read_json(data / "labels.json"))


def load_pad_id(data: Path, checkpoint: Path | None = None) -> int:
    """Token id that fills short texts, for the data's tokenizer or for that of a checkpoint; see `load_examples`."""
    pad_id = int(read_json(data / "tokens.json")["pad_id"])
    if checkpoint is None or _same_tokenizer(data, checkpoint):
        return pad_id
    token = Tokenizer.from_file(str(data / "tokenizer" / TOKENIZER_FILE)).id_to_token(pad_id)
    found = token and Tokenizer.from_file(str(checkpoint / TOKENIZER_FILE)).token_to_id(token)
    if found is None:
        raise UserError(f"{checkpoint / TOKENIZER_FILE}: has no {token}, with which {data} fills short texts")
    return int(found)


def _same_tokenizer(data: Path, checkpoint: Path) -> bool:
    return file_sha256(data / "tokenizer" / TOKENIZER_FILE) == file_sha256(checkpoint / TOKENIZER_FILE)


def load_maximum_length(data: Path) -> int:
    """Tokens per text at most."""
    return int(read_json(data / "tokens.json")["maximum_length"])


def sample(examples: Examples, count: int, seed: int) -> Examples:
    """Draw at most `count` examples without replacement."""
    generator = numpy.random.default_rng(seed)
    chosen = generator.permutation(len(examples))[:count]
    return examples.select(sorted(chosen.tolist()))

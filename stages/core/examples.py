"""Tokenized examples on disk, and models judged on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy
import pyarrow.parquet
import torch
from torch import Tensor, nn

from stages.core.artifacts import read_json
from stages.core.batches import length_batches, pad_tensors
from stages.core.checkpoints import logits_of
from stages.core.tasks import Task
from stages.core.training import to_device

SPLITS = ("train", "validation", "test")
_BATCH_SIZE = 64


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


def predict_logits(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Run a model over token rows in batches of similar length; logits [n, classes] in the order given."""
    batches = length_batches([len(row) for row in rows], _BATCH_SIZE)
    parts = [
        logits_of(model, to_device(pad_tensors([rows[i] for i in batch], pad_id), model)).cpu() for batch in batches
    ]
    order = torch.tensor([index for batch in batches for index in batch])
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, order, logits)


def judge(model: nn.Module, task: Task, metric: str, examples: Examples, pad_id: int) -> tuple[float, dict[str, float]]:
    """Score a model on the validation split.

    Returns:
        a score, larger is better, whose ties are broken by the loss; and loss, accuracy and the metric for the curves.
    """
    logits = predict_logits(model, examples.input_ids, pad_id)
    loss = float(task.loss(logits, torch.from_numpy(examples.labels), smoothing=0.0))
    quality = {name: task.score(name, logits, examples.labels) for name in dict.fromkeys(("accuracy", metric))}
    values = {"validation_loss": loss, **{f"validation_{name}": value for name, value in quality.items()}}
    return quality[metric] - 1e-4 * loss, values


def validation_quality(model: nn.Module, task: Task, examples: Examples, pad_id: int) -> dict[str, float]:
    """Measure accuracy and macro F1 on the validation split, as every training stage reports them."""
    logits = predict_logits(model, examples.input_ids, pad_id)
    return {name: task.score(name, logits, examples.labels) for name in ("accuracy", "f1_macro", "f1_weighted")}

"""What a peer is given: the checkpoint and texts to calibrate on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from benchmarks.peers.service import Batch, load_tokenizer, pad


@dataclass(frozen=True)
class Task:
    """The fine-tuned checkpoint and texts of its training split."""

    checkpoint: Path
    """Folder in Hugging Face's format, with tokenizer.json."""
    maximum_length: int
    pad_id: int
    texts: tuple[str, ...]
    """For calibration."""
    labels: tuple[int, ...]
    """Class indices of the texts."""

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read a task that the benchmark wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            Path(fields["checkpoint"]),
            fields["maximum_length"],
            fields["pad_id"],
            tuple(fields["texts"]),
            tuple(fields["labels"]),
        )

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.checkpoint / "tokenizer.json"

    def batches(self, size: int, texts: int) -> Iterator[tuple[Batch, numpy.ndarray]]:
        """Give the first `texts` as batches of ids and masks, with their labels."""
        tokenizer = load_tokenizer(self.tokenizer, self.maximum_length)
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(self.texts[:texts]))]
        for start in range(0, len(rows), size):
            chosen = slice(start, start + size)
            yield pad(rows[chosen], self.pad_id, None), numpy.asarray(self.labels[chosen], dtype=numpy.int64)

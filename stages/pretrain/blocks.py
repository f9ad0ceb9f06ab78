"""Packed blocks of the corpus, and in which order a run sees them."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from stages.core.errors import UserError
from stages.core.examples import load_dataset
from stages.core.packing import load_documents

_SHORTEST_BLOCK = 8  # that params allow, where there is none to look at


class Blocks:
    """Training and held-out blocks, and the training blocks of every step."""

    def __init__(self, folder: Path, steps: int, batch_tokens: int, seed: int):
        self.train = load_blocks(folder / "train.parquet")
        self.heldout = load_blocks(folder / "heldout.parquet")
        if steps and not (len(self.train) and len(self.heldout)):
            raise UserError(
                "params.yaml: pretrain.steps: the corpus gives no blocks to train on; "
                "add to acquire.corpus, raise tokenize.corpus_tokens, or set pretrain.steps to 0"
            )
        self.length = self.train.shape[1] if len(self.train) else _SHORTEST_BLOCK
        self.per_batch = max(1, batch_tokens // self.length)
        self._steps, self._seed = steps, seed
        self._known: tuple[int, numpy.ndarray] | None = None
        self.train_documents = load_documents(folder / "train.parquet")
        self.heldout_documents = load_documents(folder / "heldout.parquet")

    def batches(self, index: int, parts: int) -> list[list[int]]:
        """Batches of one part of the run: the number of the step, then rows of the training blocks.

        All parts together are `steps` batches over ever new shuffles.
        """
        first, last = (self._steps * part // parts for part in (index, index + 1))
        return [self._batch(step) for step in range(first, last)]

    def _batch(self, step: int) -> list[int]:
        count = len(self.train)
        positions = range(step * self.per_batch, (step + 1) * self.per_batch)
        return [step, *(int(self._order(p // count)[p % count]) for p in positions)]

    def _order(self, epoch: int) -> numpy.ndarray:
        if self._known is None or self._known[0] != epoch:
            self._known = (epoch, numpy.random.default_rng([self._seed, epoch]).permutation(len(self.train)))
        return self._known[1]


def load_blocks(path: Path) -> Tensor:
    """Read packed blocks, int64 [blocks, length]."""
    rows = load_dataset(path)["input_ids"]
    return torch.tensor(numpy.array(rows[:], dtype=numpy.int64))

"""What every contender does alike: texts to token ids, batches by length, logits to labels, and the clock.

Peers differ in how they make a model and in how they run a batch, in nothing else. The tokenizer is Rust's, called
directly: at least as fast as any way that a peer documents.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy
from tokenizers import Tokenizer

Array = numpy.ndarray
Batch = tuple[Array, Array]
MILLISECONDS = 1e3


class Service(Protocol):
    """A model that a peer has loaded."""

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute logits, float32 [batch, labels], of batches of int64 [batch, length] ids and masks."""


class Classifier(Protocol):
    """Texts in, label indices out."""

    def classify(self, texts: Sequence[str], batch_size: int) -> list[int]:
        """Predict the label of every text, in order."""


class Answering:
    """A service with the tokenizer of the checkpoint.

    Args:
        service: of a peer.
        tokenizer: of the checkpoint.
        pad_id: token id that fills short texts.
        by_length: put texts of similar length into one batch; otherwise they are answered as they come.
        padded_to: length of every batch in tokens; None is the longest text in it.
    """

    def __init__(
        self, service: Service, tokenizer: Tokenizer, pad_id: int, by_length: bool = True, padded_to: int | None = None
    ):
        self._service = service
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._by_length = by_length
        self._padded_to = padded_to

    def classify(self, texts: Sequence[str], batch_size: int) -> list[int]:
        """Predict the label of every text, in order."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        order = list(range(len(rows)))
        if self._by_length:
            order.sort(key=lambda index: len(rows[index]))
        chosen = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches = [pad([rows[index] for index in batch], self._pad_id, self._padded_to) for batch in chosen]
        labels = [0] * len(rows)
        for batch, logits in zip(chosen, self._service.logits_many(batches), strict=True):
            for index, label in zip(batch, logits.argmax(axis=1).tolist(), strict=True):
                labels[index] = label
        return labels


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None) -> Batch:
    """Stack token ids as int64 [rows, length], with the mask that tells tokens from filling."""
    longest = length or max(len(row) for row in rows)
    input_ids = numpy.full((len(rows), longest), pad_id, dtype=numpy.int64)
    mask = numpy.zeros((len(rows), longest), dtype=numpy.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return input_ids, mask


def load_tokenizer(path: Path, maximum_length: int) -> Tokenizer:
    """Read a tokenizer.json; texts are cut at the maximum length and not padded."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(maximum_length)
    return tokenizer


def seconds_for(classifier: Classifier, texts: Sequence[str], batch_size: int) -> float:
    """Time one pass over the texts, tokenization included."""
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    classifier.classify(texts, batch_size)
    spent = time.perf_counter() - started
    gc.enable()
    return spent


def milliseconds_for_each(classifier: Classifier, texts: Sequence[str]) -> list[float]:
    """Time texts one by one, tokenization included."""
    gc.collect()
    gc.disable()
    spent = []
    for text in texts:
        started = time.perf_counter()
        classifier.classify([text], 1)
        spent.append((time.perf_counter() - started) * MILLISECONDS)
    gc.enable()
    return spent


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MiB: VmHWM, which unlike ru_maxrss starts anew with the program."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise OSError("/proc/self/status tells no VmHWM; the benchmark needs Linux")

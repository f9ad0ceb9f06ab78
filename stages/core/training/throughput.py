"""How fast a model trains: tokens a second, and how much of the machine's arithmetic that takes.

Model-FLOPs utilization (PaLM, 2204.02311, appendix B): the operations that training needs by arithmetic alone, over
those that the machine can do in the time. A token needs six operations a weight that it is multiplied with, and
12 x layers x width x length for attention. Embeddings are looked up, not multiplied; the head counts only where there
is a label; padding and what is computed twice count for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.core.hardware import TrainingPrecision
from stages.core.products import product_rate
from stages.core.structure import outermost
from stages.core.training.recipe import Position, Tensors, count_examples

_DTYPES: dict[TrainingPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """What a model multiplies, in weights."""

    body: float
    """That every token is multiplied with."""
    head: float
    """That only a label's position, or a text as a whole, is multiplied with."""
    attention: float
    """Layers times width: of the products among activations, per pair of tokens."""

    @classmethod
    def of(cls, model: nn.Module) -> Arithmetic | None:
        """Read it from the parts of a model that are matrix products; layers that share weights count each time.

        None where tokens do not all go through the same weights: with a decoder beside an encoder, or several models.
        """
        found = outermost(model)
        if not found:
            return cls(float(sum(map(_weights, model.modules()))), 0.0, 0.0)
        whole, config = found[0], cast(Any, found[0].config)
        if len(found) > 1 or config.is_encoder_decoder:
            return None
        base: nn.Module = whole.base_model
        counted = {id(part) for name, part in base.named_modules() if "pooler" not in name}
        body = sum(_weights(part) for part in model.modules() if id(part) in counted)
        head = sum(_weights(part) for part in model.modules() if id(part) not in counted)
        repeats = config.num_hidden_layers / config.num_hidden_groups if hasattr(config, "num_hidden_groups") else 1
        return cls(float(body * repeats), float(head), float(config.num_hidden_layers * config.hidden_size))

    def operations(self, tokens: float, pairs: float, labels: float) -> float:
        """Count the operations of a training step, forward and backward.

        Args:
            tokens: without padding.
            pairs: of tokens of one text, ordered.
            labels: positions or texts that have one.
        """
        return 6.0 * (self.body * tokens + self.head * labels) + 12.0 * self.attention * pairs


def _weights(part: nn.Module) -> int:
    return part.weight.numel() if isinstance(part, nn.Linear | Conv1D) else 0


def count_tokens(tensors: Tensors) -> tuple[float, float]:
    """Count the tokens of a batch that are no padding, and the ordered pairs of tokens of one text."""
    lengths = _lengths(tensors).double()
    return float(lengths.sum()), float(lengths.square().sum())


def _lengths(tensors: Tensors) -> torch.Tensor:
    if "attention_mask" in tensors:
        return tensors["attention_mask"].flatten(1).sum(1)
    if "documents" in tensors:
        documents = tensors["documents"]
        numbers = documents + torch.arange(len(documents)).unsqueeze(1) * documents.shape[1]
        return numbers[documents >= 0].bincount()
    rows = next(iter(tensors.values()))
    return torch.full((len(rows),), rows.shape[1] if rows.ndim > 1 else 1)


@cache
def ceiling(precision: TrainingPrecision, device: str) -> float:
    """Operations a second that the device can do at most; measured once a process, in half a second."""
    return product_rate(_DTYPES[precision], device)


def count_labels(tensors: Tensors) -> float:
    """Count the positions of a batch that have a label, or its texts where the label is of the text."""
    return float(tensors["chosen"].sum()) if "chosen" in tensors else count_examples(tensors)


class Meter:
    """Counts what training does and the time it takes, evaluations left out."""

    def __init__(self, model: nn.Module, precision: TrainingPrecision, device: str, processes: int):
        self._arithmetic, self._precision, self._device = Arithmetic.of(model), precision, device
        self._processes, self._position = processes, Position()
        self._since = 0.0
        self._tokens = self._operations = self._seconds = 0.0
        self.shown = ""

    @contextmanager
    def running(self, position: Position) -> Iterator[None]:
        """Let the time count, as spent by a run that stands there."""
        self._position = position
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._tick()

    def add(self, tensors: Tensors, labels: float) -> None:
        """Count a batch that was trained on."""
        tokens, pairs = count_tokens(tensors)
        self._tokens += tokens
        if self._arithmetic is not None:
            self._operations += self._arithmetic.operations(tokens, pairs, labels)

    def read(self) -> dict[str, float]:
        """Speed since the last reading, and the seconds trained so far, so that time to any loss can be read off."""
        self._tick()
        speed = self._tokens / self._seconds
        told = {"tokens_per_second": speed, "seconds": self._position.seconds}
        self.shown = f"{speed:,.0f} tokens/s"
        if self._arithmetic is not None:
            most = ceiling(self._precision, self._device) * self._processes
            told["flops_utilization"] = self._operations / self._seconds / most
            self.shown += f", {told['flops_utilization']:.0%} of {self._precision} products"
        self._tokens = self._operations = self._seconds = 0.0
        self._since = time.perf_counter()  # the ceiling took time to measure
        return told

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._position.seconds += now - self._since
        self._since = now

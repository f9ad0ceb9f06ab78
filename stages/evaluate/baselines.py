"""The fine-tuned model in PyTorch float32, as the naive and the fair service would run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stages.core.batches import pad
from stages.core.cascade import Exported
from stages.core.checkpoints import logits_of
from stages.core.hardware import thread_limit


class PyTorchService:
    """Answers texts in the order in which they come, in batches.

    Args:
        network: classifier in float32.
        model: with the tokenizer of the network.
        length: to pad to; None pads to the longest text in the batch.
    """

    def __init__(self, network: nn.Module, model: Exported, length: int | None):
        self.length = length
        self._network = network
        self._model = model

    def classify(self, texts: Sequence[str], batch_size: int) -> list[int]:
        """Predict label indices."""
        rows = self._model.encode(texts)
        predictions: list[int] = []
        for start in range(0, len(rows), batch_size):
            input_ids, attention_mask = pad(rows[start : start + batch_size], self._model.pad_id, length=self.length)
            batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
            predictions += logits_of(self._network, batch).argmax(dim=1).tolist()
        return predictions


def naive_length(wanted: int, network: nn.Module) -> int:
    """Length to which the naive baseline pads: as wanted, but no longer than the model has positions."""
    return min(wanted, _positions(network) or wanted)


def prepare_pytorch() -> None:
    """Let PyTorch run as fast as it can: the stage contract asks for determinism, which costs the baselines time."""
    torch.use_deterministic_algorithms(False)
    threads = thread_limit()
    if threads is not None:
        torch.set_num_threads(threads)


def _positions(network: nn.Module) -> int | None:
    """Longest input in tokens, from the table of positions; RoBERTa's kin keep the first rows for padding."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            table: Any = module
            return int(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    return None

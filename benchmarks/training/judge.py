"""How good a model is: computed in one way for both sides, with the clock stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.settings import SHARED
from stages.core.batches import length_batches, pad
from stages.core.examples import load_examples, load_pad_id
from stages.core.judging import predict_logits

_BATCH_SIZE = 16
_SEED = 0


class HeldOut:
    """Texts to guess hidden tokens of; which ones are hidden is the same for everybody.

    Args:
        rows: token ids, special ones included.
        special: ids that are never hidden.
        mask_id: that hides a token.
        pad_id: that fills short rows.
    """

    def __init__(self, rows: Sequence[Sequence[int]], special: Tensor, mask_id: int, pad_id: int):
        generator = torch.Generator().manual_seed(_SEED)
        self._batches = []
        for batch in length_batches([len(row) for row in rows], _BATCH_SIZE):
            ids, attention = map(torch.from_numpy, pad([rows[index] for index in batch], pad_id))
            chosen = torch.rand(ids.shape, generator=generator) < SHARED.mask_probability
            chosen &= ~torch.isin(ids, special)
            seen = torch.where(chosen, torch.full_like(ids, mask_id), ids)
            self._batches.append((seen, attention, torch.where(chosen, ids, torch.full_like(ids, -100))))

    @torch.inference_mode()
    def loss(self, model: Any) -> float:
        """Mean cross-entropy of the hidden tokens in nats, in the precision of the training."""
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for seen, attention, labels in self._batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=SHARED.precision == "bf16"):
                logits = model(input_ids=seen.to(device), attention_mask=attention.to(device)).logits
            chosen = labels >= 0
            wanted = labels[chosen].to(device)
            total += float(functional.cross_entropy(logits[chosen.to(device)].float(), wanted, reduction="sum"))
            count += int(chosen.sum())
        return total / count


def join(rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Texts behind each other in rows of one length, as packed ones: a first token, then texts with separators."""
    begin = rows[0][0]
    body = list(chain.from_iterable(row[1:] for row in rows))
    width = length - 1
    return [[begin, *body[start : start + width]] for start in range(0, len(body) - width + 1, width)]


def accuracy_judge(data: Path) -> Callable[[nn.Module], float]:
    """Accuracy on the validation split of the tokenized data."""
    examples, pad_id = load_examples(data, "validation"), load_pad_id(data)
    labels = torch.from_numpy(examples.labels)

    def judge(model: nn.Module) -> float:
        predictions = predict_logits(model, examples.input_ids, pad_id).argmax(dim=-1)
        return float((predictions == labels).double().mean())

    return judge

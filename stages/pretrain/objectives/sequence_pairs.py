"""What the objectives of encoders with a decoder have in common: a broken text goes in, another comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.training.recipe import Tensors
from stages.pretrain.model import build_model, probe


class SequencePairs:
    """The decoder is taught to write the target tokens from the broken input, each from those before it.

    All targets of an objective are of one length and every one of their tokens has a label, so that no logits are
    wasted.
    """

    vocabulary_head = True
    least_blocks = 1
    keeps_apart = False

    def __init__(self, checkpoint: Path, tokenizer: Any, vocabulary: int, length: int, objective: str):
        kinds = (transformers.AutoModelForSeq2SeqLM,)
        self.model = build_model(checkpoint, kinds, tokenizer, vocabulary, objective)
        config: Any = self.model.config
        self._start: int = config.decoder_start_token_id
        if self._start is None:
            raise UserError(f"{checkpoint}: config.json has no decoder_start_token_id, which the decoder begins with")
        ids = torch.ones(1, length, dtype=torch.int64)
        probe(self.model, ids, decoder_input_ids=ids)

    def loss(self, tensors: Tensors) -> Tensor:
        """Cross-entropy of the targets."""
        targets = tensors["targets"]
        before = functional.pad(targets[:, :-1], (1, 0), value=self._start)
        logits = self.model(
            input_ids=tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            decoder_input_ids=before,
            use_cache=False,
        ).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def weight(self, tensors: Tensors) -> float:
        """Count the target tokens."""
        return float(tensors["targets"].numel())

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Loss in nats a target token."""
        return {"heldout_loss": float(self.loss(tensors))}

    def scored(self, blocks: Tensor) -> Tensor | None:
        """Tell nothing: sentinels, and tokens that only need to be copied, are among the targets."""
        return None

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Hand on the model."""
        return {"model": self.model}

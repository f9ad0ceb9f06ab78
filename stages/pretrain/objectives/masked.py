"""Masked-language-model training (BERT, 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.masked_language import chosen_logits
from stages.core.packing import packed_inputs
from stages.core.params import MaskedObjective
from stages.core.training.recipe import Tensors
from stages.pretrain.masking import Masking
from stages.pretrain.model import build_model, require_tokens, sees_ahead


class Masked:
    """Hidden tokens are guessed from both sides."""

    vocabulary_head = True
    least_blocks = 1
    keeps_apart = True

    def __init__(self, params: MaskedObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "mask", "pad")
        # XLNet's one language-model class goes by the name of a causal one, and reads both sides all the same.
        kinds = (transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM)
        self.model = build_model(checkpoint, kinds, tokenizer, len(tokenizer), params.kind)
        if not sees_ahead(self.model, length):
            raise UserError(
                f"{checkpoint}: the model reads from left to right only; set pretrain.objective.kind to causal"
            )
        self._masking = Masking(params, tokenizer)

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Hide tokens."""
        seen, chosen = self._masking.hide(blocks, progress, generator)
        return {"seen": seen, "chosen": chosen, "blocks": blocks}

    def loss(self, tensors: Tensors) -> Tensor:
        """Cross-entropy of the hidden tokens."""
        chosen, apart = tensors["chosen"], packed_inputs(self.model, tensors.get("documents"))
        logits = chosen_logits(self.model, tensors["seen"], chosen, **apart)
        return functional.cross_entropy(logits.float(), tensors["blocks"][chosen])

    def weight(self, tensors: Tensors) -> float:
        """Count the hidden tokens."""
        return float(tensors["chosen"].sum())

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Loss in nats a hidden token."""
        return {"heldout_loss": float(self.loss(tensors))}

    def scored(self, blocks: Tensor) -> Tensor:
        """All but special tokens."""
        return ~torch.isin(blocks, self._masking.special)

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Hand on the model."""
        return {"model": self.model}

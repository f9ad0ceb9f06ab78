"""Causal language modelling (GPT, Radford et al. 2018): every token from those before it."""

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
from stages.core.params import CausalObjective
from stages.core.training.recipe import Tensors
from stages.pretrain.model import build_model, require_tokens, sees_ahead


class Causal:
    """The next token is guessed, at every token but pads."""

    vocabulary_head = True
    least_blocks = 1
    keeps_apart = True

    def __init__(self, params: CausalObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "pad")
        kinds = (transformers.AutoModelForCausalLM,)
        self.model = build_model(checkpoint, kinds, tokenizer, len(tokenizer), params.kind)
        if sees_ahead(self.model, length):
            raise UserError(
                f"{checkpoint}: the model sees the tokens that it should guess; take a decoder such as gpt2 or llama, "
                "or an encoder with is_decoder: true in its configuration"
            )
        # Tokenizers without a pad token pad with the one that ends a text, which is to be learned.
        self._pad = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Say where there is a next token."""
        return {"blocks": blocks, "following": blocks.roll(-1, dims=1), "chosen": self.scored(blocks).roll(-1, dims=1)}

    def loss(self, tensors: Tensors) -> Tensor:
        """Cross-entropy of the next tokens."""
        chosen, documents = guessed(tensors), tensors.get("documents")
        logits = chosen_logits(
            self.model, tensors["blocks"], chosen, **packed_inputs(self.model, documents, backwards=True)
        )
        return functional.cross_entropy(logits.float(), tensors["following"][chosen])

    def weight(self, tensors: Tensors) -> float:
        """Count the tokens guessed."""
        return float(guessed(tensors).sum())

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Loss in nats a token."""
        return {"heldout_loss": float(self.loss(tensors))}

    def scored(self, blocks: Tensor) -> Tensor:
        """All but pads and the first of a block, which nothing comes before."""
        scored = torch.ones_like(blocks, dtype=torch.bool) if self._pad is None else blocks != self._pad
        scored[:, 0] = False
        return scored

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Hand on the model."""
        return {"model": self.model}


def guessed(tensors: Tensors) -> Tensor:
    """Tokens whose next one is guessed, bool [blocks, length]: where documents are apart, none beyond their own."""
    chosen, documents = tensors["chosen"], tensors.get("documents")
    return chosen if documents is None else chosen & (documents >= 0) & (documents == documents.roll(-1, dims=1))

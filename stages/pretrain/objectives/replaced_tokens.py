"""Replaced-token detection (ELECTRA, 2003.10555)."""

from __future__ import annotations

import copy
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
from stages.core.params import ReplacedTokensObjective
from stages.core.training.recipe import Tensors
from stages.pretrain.masking import Masking
from stages.pretrain.model import build_model, probe, require_tokens
from stages.pretrain.objectives.objective import row_share

_HELDOUT_SEED = 0


class GeneratorAndDiscriminator(nn.Module):
    """Both models as one, with one set of embeddings, so that they are trained and saved together."""

    def __init__(self, discriminator: Any, generator: Any):
        super().__init__()
        self.discriminator, self.generator, self.config = discriminator, generator, discriminator.config
        generator.electra.embeddings = discriminator.electra.embeddings
        generator.tie_weights()


class ReplacedTokens:
    """A generator guesses hidden tokens; the discriminator tells of every token whether it was put there."""

    vocabulary_head = False
    least_blocks = 1
    keeps_apart = True

    def __init__(self, params: ReplacedTokensObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "mask", "pad")
        kinds = (transformers.AutoModelForPreTraining,)
        discriminator: Any = build_model(checkpoint, kinds, tokenizer, len(tokenizer), params.kind)
        if not isinstance(discriminator, transformers.ElectraForPreTraining):
            raise UserError(
                f"{checkpoint}: pretrain.objective.kind {params.kind} takes model_type electra, "
                f"not {discriminator.config.model_type}"
            )
        generator = transformers.ElectraForMaskedLM(generator_config(discriminator.config, params))
        self.model = GeneratorAndDiscriminator(discriminator, generator)
        probe(discriminator, torch.ones(1, length, dtype=torch.int64))
        self._params, self._masking = params, Masking(params, tokenizer)

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Hide tokens."""
        seen, chosen = self._masking.hide(blocks, progress, generator)
        return {"seen": seen, "chosen": chosen, "blocks": blocks, "share": row_share(chosen)}

    def loss(self, tensors: Tensors) -> Tensor:
        """Loss of the generator at the hidden tokens, and that of the discriminator at all tokens by its weight."""
        logits = self._generated(tensors)
        replaced = self._replaced(tensors, logits, None)
        told = self._told(tensors, replaced)
        was_replaced = (replaced != tensors["blocks"]).float()
        losses = functional.binary_cross_entropy_with_logits(told, was_replaced, reduction="none")
        return self._generator_loss(tensors, logits) + self._params.discriminator_weight * (
            (losses * _real(tensors)).mean()  # over all positions, so that the parts of a batch add up
        )

    def weight(self, tensors: Tensors) -> float:
        """Count the blocks; the shares see to it that every hidden token weighs the same."""
        return float(len(tensors["blocks"]))

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Loss of the discriminator in nats a token, what it finds and what it lets stand, and the generator's loss."""
        logits = self._generated(tensors)
        chance = torch.Generator(logits.device).manual_seed(_HELDOUT_SEED)
        replaced = self._replaced(tensors, logits, chance)
        real = _real(tensors)
        told, was_replaced = self._told(tensors, replaced)[real], (replaced != tensors["blocks"])[real]
        loss = functional.binary_cross_entropy_with_logits(told, was_replaced.float())
        return {
            "heldout_loss": float(loss),
            "replaced_found": float(((told > 0) & was_replaced).sum() / was_replaced.sum().clamp(min=1)),
            "originals_kept": float(((told <= 0) & ~was_replaced).sum() / (~was_replaced).sum().clamp(min=1)),
            "generator_loss": float(self._generator_loss(tensors, logits)),
        }

    def scored(self, blocks: Tensor) -> Tensor | None:
        """Tell nothing: the discriminator guesses no tokens."""
        return None

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Hand on the discriminator, and keep the generator where that is wanted."""
        models: dict[str, nn.Module] = {"model": self.model.discriminator}
        return models | {"generator": self.model.generator} if self._params.keep_generator else models

    def _generated(self, tensors: Tensors) -> Tensor:
        """The generator's logits at the hidden tokens, [chosen, vocabulary]."""
        generator, documents = self.model.generator, tensors.get("documents")
        apart = packed_inputs(generator, documents)
        return chosen_logits(generator, tensors["seen"], tensors["chosen"], **apart).float()

    def _generator_loss(self, tensors: Tensors, logits: Tensor) -> Tensor:
        chosen = tensors["chosen"]
        losses = functional.cross_entropy(logits, tensors["blocks"][chosen], reduction="none")
        return (losses * tensors["share"][chosen]).sum() / len(chosen)

    def _replaced(self, tensors: Tensors, logits: Tensor, chance: torch.Generator | None) -> Tensor:
        """The blocks with hidden tokens as the generator guesses them; no gradient flows through the draw."""
        replaced = tensors["blocks"].clone()
        replaced[tensors["chosen"]] = draw(logits.detach(), chance)
        return replaced

    def _told(self, tensors: Tensors, replaced: Tensor) -> Tensor:
        """The discriminator's logits that a token was put there, [blocks, length]."""
        apart = packed_inputs(self.model.discriminator, tensors.get("documents"))
        logits: Tensor = self.model.discriminator(input_ids=replaced, **apart).logits
        return logits.float()


def _real(tensors: Tensors) -> Tensor:
    """Which positions hold a token of a document, bool [blocks, length]."""
    documents = tensors.get("documents")
    return torch.ones_like(tensors["blocks"], dtype=torch.bool) if documents is None else documents >= 0


def draw(logits: Tensor, chance: torch.Generator | None) -> Tensor:
    """Draw a token for each row of logits by its probability: the largest after Gumbel noise.

    Args:
        logits: [rows, vocabulary].
        chance: source of chance; None takes the one whose state a training run saves.
    """
    # An exponential variable's negative logarithm is a Gumbel one.
    noise = torch.empty_like(logits).exponential_(generator=chance).clamp(min=1e-30).log().neg()
    return (logits + noise).argmax(dim=-1)


def generator_config(discriminator: Any, params: ReplacedTokensObjective) -> Any:
    """Derive the generator's configuration: fewer heads of the same width, and fewer neurons (section 3.2)."""
    config, share = copy.deepcopy(discriminator), params.generator_share
    width = discriminator.hidden_size // discriminator.num_attention_heads
    heads = max(1, round(discriminator.num_attention_heads * share))
    derived = {
        "num_attention_heads": heads,
        "hidden_size": heads * width,
        "intermediate_size": max(1, round(discriminator.intermediate_size * share)),
    }
    for name, value in {**derived, **(params.generator_config or {})}.items():
        if not hasattr(config, name):
            raise UserError(f"params.yaml: pretrain.objective.generator_config: {name} is no value of an electra model")
        setattr(config, name, value)
    return config

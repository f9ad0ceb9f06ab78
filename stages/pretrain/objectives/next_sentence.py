"""Masked tokens and next-sentence prediction (BERT, 1810.04805, section 3.1, tasks 1 and 2).

A pair is a block cut behind the separator nearest its middle. Half of the pairs keep their second half; the others get
that of another block. What follows a separator is the next text that tokenize packed: the next turn or sentence where
`tokenize.corpus_tokens` takes in the whole corpus, and one a little further on where it takes an even sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.masked_language import only_at
from stages.core.params import NextSentenceObjective
from stages.core.training.recipe import Tensors
from stages.pretrain.masking import Masking
from stages.pretrain.model import build_model, probe, require_tokens
from stages.pretrain.objectives.objective import row_share

FOLLOWS, OTHER, UNKNOWN = 0, 1, -100
_PAIR_LOGITS = ("seq_relationship_logits", "sop_logits")


class NextSentence:
    """Hidden tokens are guessed, and whether the two halves of a pair belong together."""

    vocabulary_head = True
    least_blocks = 2
    keeps_apart = False

    def __init__(self, params: NextSentenceObjective, checkpoint: Path, tokenizer: Any, length: int):
        require_tokens(tokenizer, params.kind, "mask", "pad", "cls", "sep")
        kinds = (transformers.AutoModelForPreTraining,)
        self.model = build_model(checkpoint, kinds, tokenizer, len(tokenizer), params.kind)
        self._pair_logits = self._find_pair_head(checkpoint, length)
        self._masking = Masking(params, tokenizer)
        self._separator, self._pad = tokenizer.sep_token_id, tokenizer.pad_token_id

    def _find_pair_head(self, checkpoint: Path, length: int) -> str:
        # The classes for pretraining of other families have no head for pairs.
        config: Any = self.model.config
        if not config.is_encoder_decoder:
            outputs = probe(self.model, torch.ones(1, length, dtype=torch.int64))
            for name in _PAIR_LOGITS:
                if name in outputs:
                    return name
        raise UserError(
            f"{checkpoint}: {config.model_type} has no next-sentence head; "
            "take a bert or albert, or set pretrain.objective.kind to masked"
        )

    def prepare(self, blocks: Tensor, progress: float, generator: torch.Generator) -> Tensors:
        """Make pairs and hide tokens of them."""
        pairs = make_pairs(blocks, self._separator, self._pad, generator)
        seen, chosen = self._masking.hide(pairs["blocks"], progress, generator)
        judged = (pairs["follows"] != UNKNOWN).unsqueeze(1)
        return {
            **pairs,
            "seen": seen,
            "chosen": chosen,
            "share": row_share(chosen),
            "pair_share": row_share(judged).squeeze(1),
        }

    def loss(self, tensors: Tensors) -> Tensor:
        """Mean loss of the hidden tokens and mean loss of the pairs, added."""
        tokens, pairs, _ = self._losses(tensors)
        return (tokens * tensors["share"][tensors["chosen"]]).sum() / len(pairs) + (
            pairs * tensors["pair_share"]
        ).mean()

    def weight(self, tensors: Tensors) -> float:
        """Count the pairs; the shares see to it that every hidden token weighs the same."""
        return float(len(tensors["blocks"]))

    def measure(self, tensors: Tensors) -> dict[str, float]:
        """Loss in nats a hidden token, and how often the model is right about a pair."""
        tokens, pairs, right = self._losses(tensors)
        judged = int((tensors["follows"] != UNKNOWN).sum())
        figures = {"heldout_loss": float(tokens.mean())}
        if not judged:
            return figures
        return figures | {
            "next_sentence_loss": float(pairs.sum()) / judged,
            "next_sentence_accuracy": float(right.sum()) / judged,
        }

    def scored(self, blocks: Tensor) -> Tensor:
        """All but special tokens."""
        return ~torch.isin(blocks, self._masking.special)

    def handed_on(self) -> Mapping[str, nn.Module]:
        """Hand on the model."""
        return {"model": self.model}

    def _losses(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the hidden tokens [chosen] and of the pairs [rows], and which pairs were told right [rows]."""
        chosen, follows = tensors["chosen"], tensors["follows"]
        with only_at(self.model, chosen):
            outputs = self.model(
                input_ids=tensors["seen"], attention_mask=tensors["mask"], token_type_ids=tensors["parts"]
            )
        logits = outputs[self._pair_logits].float()
        tokens = functional.cross_entropy(
            outputs.prediction_logits.squeeze(0).float(), tensors["blocks"][chosen], reduction="none"
        )
        pairs = functional.cross_entropy(logits, follows, reduction="none", ignore_index=UNKNOWN)
        return tokens, pairs, logits.argmax(dim=-1) == follows


def make_pairs(blocks: Tensor, separator: int, pad: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Cut blocks in two and give some of them the second half of another block.

    Both second halves that a block may get are cut to the length of the shorter, so that the length tells nothing.
    A block that has no separator, or whose other block has none, keeps its own half and is not judged.

    Args:
        blocks: [blocks, length]; the other block of each is the one before it.
        separator: id that ends a text.
        pad: id behind pairs that are shorter than a block.
        generator: source of chance.

    Returns:
        `blocks` [blocks, length], `mask` (1 where there is a token), `parts` (0 and 1, as token types), and
        `follows` [blocks]: `FOLLOWS`, `OTHER` or `UNKNOWN`.
    """
    count, length = blocks.shape
    cut, found = _middle_separator(blocks, separator)
    other = torch.arange(count).roll(1)
    wanted = torch.rand(count, generator=generator) < 0.5
    judged = found & found[other] & (count > 1)
    source = torch.where(wanted & judged, other, torch.arange(count))
    follows = torch.where(judged, torch.where(wanted, OTHER, FOLLOWS), UNKNOWN)
    second_length = length - 1 - torch.where(judged, torch.maximum(cut, cut[other]), cut)

    position = torch.arange(length).expand(count, length)
    second = position > cut.unsqueeze(1)
    offset = (position + (cut[source] - cut).unsqueeze(1)).clamp(0, length - 1)
    mask = position <= (cut + second_length).unsqueeze(1)
    paired = torch.where(second, blocks[source.unsqueeze(1), offset], blocks)
    return {
        "blocks": torch.where(mask, paired, pad),
        "mask": mask.long(),
        "parts": (second & mask).long(),
        "follows": follows,
    }


def _middle_separator(blocks: Tensor, separator: int) -> tuple[Tensor, Tensor]:
    """Position of the separator nearest the middle that has tokens on both sides, and whether there is one."""
    length = blocks.shape[1]
    is_cut = blocks == separator
    is_cut[:, [0, length - 1]] = False
    distance = (torch.arange(length) - length // 2).abs().expand(blocks.shape)
    nearest = distance.masked_fill(~is_cut, length).argmin(dim=1)
    found = is_cut.any(dim=1)
    return torch.where(found, nearest, length // 2), found

"""Mixup of word embeddings (wordMixup; Guo et al., 1905.08941): the model learns mixtures of two texts.

Partners and share are drawn when a batch is prepared, and a partner travels beside its text, so that a batch can be
cut into parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.training.recipe import Tensors


def check_mixable(model: Any) -> None:
    """Check that a model's classifier knows where a text of embeddings ends.

    Raises:
        UserError: if it finds the end by the ids of the tokens, as the classifiers of decoders do.
    """
    if type(model.config) not in transformers.AutoModelForMaskedLM._model_mapping:
        raise UserError(
            f"params.yaml: finetune.mixup: the classifier of {model.config.model_type} finds the end of a text by its "
            "tokens, and mixed texts have none; set it to 0.0"
        )


def with_partners(tensors: Tensors, alpha: float, seed: Sequence[int]) -> Tensors:
    """Put beside each text of a batch another text of it, and the share that the first has in the mixture.

    Args:
        tensors: `input_ids` and `attention_mask` [texts, length], `labels` [texts].
        alpha: the share is drawn from Beta(alpha, alpha), one for the batch.
        seed: of the draw.

    Returns:
        the same and `partner_ids`, `partner_mask`, `partner_labels`, and `share` [texts], the same everywhere.
    """
    chance = numpy.random.default_rng(list(seed))
    texts = len(tensors["labels"])
    share, order = float(chance.beta(alpha, alpha)), torch.from_numpy(chance.permutation(texts))
    return {
        **tensors,
        "partner_ids": tensors["input_ids"][order],
        "partner_mask": tensors["attention_mask"][order],
        "partner_labels": tensors["labels"][order],
        "share": torch.full((texts,), share),
    }


def is_mixed(tensors: Tensors) -> bool:
    """Tell whether the texts of a batch have partners."""
    return "share" in tensors


def mixed_inputs(embeddings: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Mix the embeddings of texts and partners; the shorter one gives nothing where it is padded.

    Returns:
        the model's keyword arguments: `inputs_embeds` [texts, length, width] and `attention_mask` [texts, length].
    """
    share = tensors["share"][:, None, None]
    own, other = tensors["attention_mask"], tensors["partner_mask"]
    mixed = share * own[:, :, None] * embeddings(tensors["input_ids"])
    mixed = mixed + (1.0 - share) * other[:, :, None] * embeddings(tensors["partner_ids"])
    return {"inputs_embeds": mixed, "attention_mask": own | other}

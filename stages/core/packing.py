"""Blocks that hold several documents, each seen by the model as if it were alone.

A block comes with a number for each of its tokens: which document of the block it belongs to, -1 where it is padded.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.examples import load_dataset

PADDED = -1


def load_documents(path: Path) -> Tensor | None:
    """Read which document each token of the blocks belongs to, int64 [blocks, length]; None where all are joined."""
    blocks = load_dataset(path)
    if "documents" not in blocks.column_names:
        return None
    return torch.tensor(numpy.array(blocks["documents"][:], dtype=numpy.int64))


def attention_within(documents: Tensor) -> Tensor:
    """Which token may look at which: those of its own document. Bool [blocks, 1, length, length]."""
    return (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)


def positions_within(documents: Tensor, first: int = 0) -> Tensor:
    """Positions [blocks, length] that start anew with each document, which must be one run of a block's tokens."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - torch.where(starts_of(documents), places, 0).cummax(dim=1).values + first


def starts_of(documents: Tensor) -> Tensor:
    """Which tokens are the first of their document, or of the padding. Bool [blocks, length]."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


def first_position(model: nn.Module) -> int:
    """Number of a text's first position: 0, but in RoBERTa and its kin the one after the padding's."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


@torch.no_grad()
def check_packable(model: nn.Module, length: int, backwards: bool = False) -> None:
    """Check that a model answers for a document in a block as for the document alone, by trying it.

    Args:
        model: a transformers language model.
        length: of a block.
        backwards: whether a token may look at those before it only.

    Raises:
        UserError: if it does not: it takes no positions, or has attention of its own kind.
    """
    refusal = UserError(
        f"params.yaml: tokenize.documents: {type(model).__name__} cannot keep the documents of a block apart; "
        "set it to joined"
    )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refusal
    training, vocabulary = model.training, cast(Any, model).config.vocab_size
    ids = (torch.arange(length) % vocabulary).unsqueeze(0)
    model.eval()
    try:
        for first in (length // 4, 0):  # with another document before it, and with a block of its own
            documents = (torch.arange(length) >= first).long().unsqueeze(0)
            packed = model(input_ids=ids, **packed_inputs(model, documents, backwards)).logits[:, first:]
            alone = model(input_ids=ids[:, first:]).logits
            if not torch.allclose(packed, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
                raise refusal
    except (RuntimeError, ValueError, TypeError):
        raise refusal from None
    finally:
        model.train(training)


def packed_inputs(model: nn.Module, documents: Tensor | None, backwards: bool = False) -> dict[str, Any]:
    """Keyword arguments of a transformers model that keep documents of a block apart; none where they are joined.

    Args:
        model: which takes `position_ids`; see `check_packable`.
        documents: [blocks, length].
        backwards: whether a token may look at those before it only.
    """
    if documents is None:
        return {}
    within = attention_within(documents)
    mask = within.tril() if backwards else within
    if cast(Any, model).config._attn_implementation == "eager":  # which adds its mask to the scores
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return {
        "attention_mask": mask,
        "position_ids": positions_within(documents, first_position(model)),
    }

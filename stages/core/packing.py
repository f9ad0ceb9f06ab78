"""Blocks that hold several documents, each seen by the model as if it were alone.

A block comes with a number for each of its tokens: which document of the block it belongs to, -1 where it is padded.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

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
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values + first


def first_position(model: nn.Module) -> int:
    """Number of a text's first position: 0, but in RoBERTa and its kin the one after the padding's."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


def check_packable(model: nn.Module) -> None:
    """Check that a model can be told where each document of a block begins.

    Raises:
        UserError: if it cannot.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"params.yaml: tokenize.documents: {type(model).__name__} takes no positions, so the documents of a block "
            "cannot be kept apart; set it to joined"
        )


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
    return {
        "attention_mask": within.tril() if backwards else within,
        "position_ids": positions_within(documents, first_position(model)),
    }

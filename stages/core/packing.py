"""Blocks that hold several documents, each seen by the model as if it were alone.

A block comes with a number for each of its tokens: which document of the block it belongs to, -1 where it is padded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

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


def packed_inputs(model: nn.Module, documents: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of a transformers encoder that keep documents of a block apart; none where they are joined."""
    if documents is None:
        return {}
    return {
        "attention_mask": attention_within(documents),
        "position_ids": positions_within(documents, first_position(model)),
    }

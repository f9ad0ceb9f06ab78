"""Word embeddings of which only the rows that the training data can touch are trained.

A vocabulary has tens of thousands of rows, a task's texts hold a few thousand of its tokens. The others have no
gradient; yet a dense step allocates, clips and updates them all. Left out, the rows that are trained move exactly as
they would (each weight alone, as in AdamW; Adafactor's column means are over the trained rows). The rows left out
stay as they are, where weight decay alone would have shrunk them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class CompactEmbedding(nn.Module):
    """An embedding whose `weight` holds only some rows; the others are looked up in the table as it was."""

    table: Tensor
    places: Tensor

    def __init__(self, embedding: nn.Embedding, tokens: Sequence[int]):
        super().__init__()
        rows = torch.tensor(tokens)
        self.padding = None if embedding.padding_idx is None else tokens.index(embedding.padding_idx)
        self.weight = nn.Parameter(embedding.weight.detach()[rows].clone())
        self.register_buffer("table", embedding.weight.detach(), persistent=False)
        self.register_buffer("places", torch.full((embedding.num_embeddings,), -1), persistent=False)
        self.places[rows] = torch.arange(len(tokens))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors [..., width] of token ids [...].

        Raises:
            ValueError: in training, if a token has no row to train.
        """
        places = self.places[input_ids]
        known = places >= 0
        if bool(known.all()):
            return functional.embedding(places, self.weight, self.padding)
        if self.training:
            raise ValueError(f"token {int(input_ids[~known][0])} is not among those that the recipe names in `tokens`")
        vectors = functional.embedding(places.clamp(min=0), self.weight)
        return torch.where(known.unsqueeze(-1), vectors, functional.embedding(input_ids, self.table))

    def write_back(self, embedding: nn.Embedding) -> None:
        """Copy the trained rows into the embedding they came from."""
        with torch.no_grad():
            embedding.weight[self.places >= 0] = self.weight.to(embedding.weight.device)


@contextmanager
def compact_embeddings(model: nn.Module, tokens: Iterable[int] | None) -> Iterator[None]:
    """Train only the word embeddings of these tokens; on leaving the model has its own embedding back, trained.

    Nothing changes where the tokens are not known, the embedding is frozen or its weight serves the output as well,
    or on accelerators, where the step over all rows costs little.
    """
    owner: Any = model
    embedding = owner.get_input_embeddings() if tokens is not None else None
    if type(embedding) is not nn.Embedding or not _is_separate(model, embedding):
        yield
        return
    padding = [] if embedding.padding_idx is None else [embedding.padding_idx]
    compact = CompactEmbedding(embedding, sorted({*(tokens or ()), *padding})).train(embedding.training)
    owner.set_input_embeddings(compact)
    try:
        yield
    finally:
        compact.write_back(embedding)
        owner.set_input_embeddings(embedding)


def _is_separate(model: nn.Module, embedding: nn.Embedding) -> bool:
    weight = embedding.weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    return len(names) == 1 and weight.requires_grad and not torch.accelerator.is_available()

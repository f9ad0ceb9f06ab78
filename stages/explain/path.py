"""The way to an answer, layer by layer, and the training texts that lie nearest to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from stages.core.batches import length_batches
from stages.core.judging import predict_logits
from stages.core.metrics import Array, softmax
from stages.core.structure import encoder_layers
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 64


@contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Leave only the first `count` encoder layers under the head for a while; 0 leaves the embeddings."""
    layers = encoder_layers(model)
    rest = list(layers)[count:]
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)


def layer_probabilities(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Array:
    """What the head answers after each layer: probabilities [layers + 1, texts, classes], the embeddings first.

    The last entry is the model's answer.
    """
    found = []
    for count in range(len(encoder_layers(model)) + 1):
        with first_layers(model, count):
            found.append(softmax(predict_logits(model, rows, pad_id).numpy()))
    return numpy.stack(found)


def settled_at(answers: Array) -> Array:
    """First layer from which on the answer is the last one, [texts], from the answers of all layers [layers, texts]."""
    differs = answers != answers[-1]
    last_change = len(answers) - 1 - differs[::-1].argmax(axis=0)
    result: Array = numpy.where(differs.any(axis=0), last_change + 1, 0)
    return result


def first_token_vectors(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Array:
    """State of the first token after the last layer, [texts, hidden], which the head reads."""
    transformer: Any = model
    batches = length_batches([len(row) for row in rows], _BATCH_SIZE)
    vectors: Array = numpy.zeros((len(rows), int(transformer.config.hidden_size)), dtype=numpy.float32)
    with torch.inference_mode():
        for batch in batches:
            states = transformer.base_model(**pad_tensors([rows[i] for i in batch], pad_id)).last_hidden_state
            vectors[batch] = states[:, 0].numpy()
    return vectors


def nearest(vectors: Array, known: Array, count: int) -> tuple[Array, Array]:
    """Find the nearest of the `known` vectors, [known, hidden], by cosine.

    Returns:
        indices and similarities, [texts, count], the nearest first.
    """
    index = NearestNeighbors(n_neighbors=min(count, len(known)), metric="cosine").fit(known)
    distances, indices = index.kneighbors(vectors)
    return indices, 1.0 - distances

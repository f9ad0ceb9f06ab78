"""Probabilities for every label from a model that did not learn from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from stages.core.batches import length_batches
from stages.core.metrics import Array
from stages.core.tensors import pad_tensors, to_device

_BATCH_SIZE = 64
# On standardized embeddings; with 5 % of the labels wrong, 1.0 follows the wrong ones and finds fewer of them.
_INVERSE_REGULARIZATION = 0.01
_ITERATIONS = 500
_FEWEST_CLASSES = 2


def read_texts(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Run a classifier over token rows.

    Returns:
        embeddings, the mean of the last layer over the tokens, float32 [texts, width]; and probabilities, float32
        [texts, classes].
    """
    batches = length_batches([len(row) for row in rows], _BATCH_SIZE)
    read = [_read_batch(model, [rows[index] for index in batch], pad_id) for batch in batches]
    order = numpy.argsort([index for batch in batches for index in batch])
    embeddings, probabilities = (numpy.concatenate(parts)[order] for parts in zip(*read, strict=True))
    return embeddings, probabilities


def _read_batch(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    batch = to_device(pad_tensors(rows, pad_id), model)
    with torch.inference_mode():
        output = model(**batch, output_hidden_states=True)
    kept = batch["attention_mask"].unsqueeze(-1).float()
    means = (output.hidden_states[-1].float() * kept).sum(dim=1) / kept.sum(dim=1)
    return means.cpu().numpy(), output.logits.float().softmax(dim=1).cpu().numpy()


def out_of_sample(embeddings: Array, labels: Array, classes: int, folds: int, seed: int) -> Array:
    """Judge each text by a logistic regression that learnt from the other folds.

    A class with fewer texts than there are folds cannot be learnt in each: its texts are left out, and get all the
    probability for the label they have, which never puts it in doubt.

    Args:
        embeddings: [texts, width].
        labels: [texts].
        classes: how many there are.
        folds: stratified, shuffled.
        seed: of the shuffling.

    Returns:
        probabilities, [texts, classes].
    """
    probabilities: Array = numpy.eye(classes)[labels]
    learnt = numpy.setdiff1d(numpy.arange(classes), small_classes(labels, classes, folds))
    if len(learnt) < _FEWEST_CLASSES:
        return probabilities
    rows = numpy.flatnonzero(numpy.isin(labels, learnt))
    classifier = LogisticRegression(C=_INVERSE_REGULARIZATION, max_iter=_ITERATIONS)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    probabilities[numpy.ix_(rows, learnt)] = cross_val_predict(
        make_pipeline(StandardScaler(), classifier), embeddings[rows], labels[rows], cv=splitter, method="predict_proba"
    )
    return probabilities


def small_classes(labels: Array, classes: int, folds: int) -> list[int]:
    """Classes with fewer texts than there are folds."""
    return [int(label) for label in numpy.flatnonzero(numpy.bincount(labels, minlength=classes) < folds)]

"""The same training several times, to see how much its result owes to chance (Dodge et al., 2002.06305)."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Sequence

import numpy
from sklearn.model_selection import StratifiedKFold

from stages.core.errors import UserError
from stages.core.examples import Examples


def spread(scores: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of a sample; 0 of a single score), minimum and maximum."""
    return {
        "mean": statistics.fmean(scores),
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "minimum": min(scores),
        "maximum": max(scores),
    }


def folds_of(examples: Examples, validation: Examples, count: int, seed: int) -> Iterator[tuple[Examples, ...]]:
    """Cut all labelled texts into parts, stratified by label, each of which is held out once.

    Of the other parts, the share that the given split has goes to validation: the best epoch is chosen there, so that
    the part held out decides nothing.

    Args:
        examples: of the training split.
        validation: split.
        count: of the parts.
        seed: of the draw.

    Yields:
        for each part the texts to train on, those to validate on, and the part itself.

    Raises:
        UserError: if there are fewer texts than parts of every label.
    """
    everything = joined(examples, validation)
    commonest = int(numpy.bincount(everything.labels).max())
    if commonest < count:
        raise UserError(f"finetune.repeats.folds: {count} parts, but no label has more than {commonest} texts")
    parts_of_split = max(2, round(len(everything) / len(validation)))
    for others, held_out in _parts(everything.labels, count, seed):
        inner = min(parts_of_split, int(numpy.bincount(everything.labels[others]).max()))
        train, chosen = next(_parts(everything.labels[others], inner, seed))
        yield (
            everything.select(others[train].tolist()),
            everything.select(others[chosen].tolist()),
            everything.select(held_out.tolist()),
        )


def joined(first: Examples, second: Examples) -> Examples:
    """Put examples behind others."""
    labels = numpy.concatenate([first.labels, second.labels])
    return Examples(first.texts + second.texts, first.input_ids + second.input_ids, labels)


def _parts(labels: numpy.ndarray, count: int, seed: int) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    cut = StratifiedKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rare label cannot be in every part
        yield from cut.split(numpy.zeros(len(labels)), labels)

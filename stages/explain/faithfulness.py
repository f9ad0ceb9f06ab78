"""Whether the words that an explanation names are those that the answer hangs on.

A ranking of words is tested by masking the first of them, and by showing only them, and watching the probability of the
answer. Texts are their own control: each is ranked at random as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import pandas
from scipy import stats

from stages.core.metrics import Array
from stages.core.params import FaithfulnessParams
from stages.explain.reader import Reader, Reading, odds_when_absent, probability

BETTER = {"comprehensiveness": 1.0, "sufficiency": -1.0, "deletion": -1.0, "insertion": 1.0}
"""Measures; 1 where more is better, -1 where less is."""
RANDOM = "random"


@dataclass(frozen=True)
class Trial:
    """What became of an answer under one ranking of a text's words."""

    deletion: Array
    """Probability of the answer with the first words masked, at even shares of the words from none to all."""
    insertion: Array
    """The same with only those words shown."""
    comprehensiveness: float
    """Probability lost by masking the first words, mean over the shares of params; more is better (1911.03429)."""
    sufficiency: float
    """Probability lost by showing only the first words, mean over the same shares; less is better."""

    def measures(self) -> dict[str, float]:
        """The four measures by name; of the curves, the area below."""
        return {
            "comprehensiveness": self.comprehensiveness,
            "sufficiency": self.sufficiency,
            "deletion": _area(self.deletion),
            "insertion": _area(self.insertion),
        }


def rank(attribution: Array) -> Array:
    """Words in the order of their attribution, the strongest for the answer first, [words]."""
    order: Array = numpy.argsort(-attribution, kind="stable")
    return order


def random_orders(words: int, count: int, seed: int) -> list[Array]:
    """Draw orders of words."""
    generator = numpy.random.default_rng(seed)
    return [generator.permutation(words) for _ in range(count)]


def try_orders(
    reader: Reader,
    readings: Sequence[Reading],
    answers: Sequence[int],
    orders: Sequence[Sequence[Array]],
    params: FaithfulnessParams,
) -> list[list[Trial]]:
    """Try several orders of words on each text; [texts][orders]."""
    sizes = [_sizes(reading.count_words(), params) for reading in readings]
    present = [
        numpy.concatenate([_variants(order, sizes[text]) for order in orders[text]]) for text in range(len(readings))
    ]
    odds = odds_when_absent(reader, readings, answers, present)
    trials = []
    for text in range(len(readings)):
        answered = probability(odds[text]).reshape(len(orders[text]), 2, len(sizes[text]))
        trials.append([_trial(without, only, params) for without, only in answered])
    return trials


def against_random(
    trials: Mapping[str, Sequence[Trial]], controls: Sequence[Sequence[Trial]], confidence: float
) -> list[dict[str, float | str | bool]]:
    """Compare methods with random orders of the same texts.

    Args:
        trials: by method, one a text.
        controls: random orders, [texts][orders].
        confidence: of the intervals.

    Returns:
        a row per method and measure: means of both, and `advantage`, larger is better, with the interval of its mean.
    """
    rows: list[dict[str, float | str | bool]] = []
    for method, tried in trials.items():
        for measure, sign in BETTER.items():
            own = numpy.array([trial.measures()[measure] for trial in tried])
            control = numpy.array(
                [numpy.mean([trial.measures()[measure] for trial in drawn]) for drawn in controls[: len(tried)]]
            )
            advantage, low, high = mean_interval(sign * (own - control), confidence)
            rows.append(
                {
                    "method": method,
                    "measure": measure,
                    "value": float(own.mean()),
                    "random": float(control.mean()),
                    "advantage": advantage,
                    "low": low,
                    "high": high,
                    "texts": len(own),
                    "better": low > 0.0,
                }
            )
    return rows


def mean_curves(trials: Mapping[str, Sequence[Trial]], controls: Sequence[Sequence[Trial]]) -> pandas.DataFrame:
    """Mean deletion and insertion curves: a row per method, random among them, and share of the words."""
    drawn = {**trials, RANDOM: [trial for row in controls for trial in row]}
    frames = []
    for method, tried in drawn.items():
        deletion = numpy.mean([trial.deletion for trial in tried], axis=0)
        insertion = numpy.mean([trial.insertion for trial in tried], axis=0)
        shares = numpy.linspace(0.0, 1.0, len(deletion))
        frames.append(
            pandas.DataFrame({"method": method, "share": shares, "deletion": deletion, "insertion": insertion})
        )
    return pandas.concat(frames, ignore_index=True)


def mean_interval(values: Array, confidence: float) -> tuple[float, float, float]:
    """Mean with Student's interval, which is fair to few texts; needs two values at least."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1.0 + confidence) / 2.0, len(values) - 1)) * error
    mean = float(values.mean())
    return mean, mean - reach, mean + reach


def _sizes(words: int, params: FaithfulnessParams) -> Array:
    """How many of the words are taken: at each point of the curves, then at each share."""
    grid = numpy.linspace(0.0, 1.0, params.points + 1)
    curve = numpy.round(grid * words)
    shares = numpy.maximum(numpy.round(numpy.array(params.shares) * words), 1)
    return numpy.concatenate([curve, shares]).astype(int)


def _variants(order: Array, sizes: Array) -> Array:
    """Which words are there, bool [2 x sizes, words]: without the first of the order, then the first alone."""
    places = numpy.empty(len(order), dtype=int)
    places[order] = numpy.arange(len(order))
    first = places[None, :] < sizes[:, None]
    return numpy.concatenate([~first, first])


def _trial(without: Array, only: Array, params: FaithfulnessParams) -> Trial:
    points = params.points + 1
    whole = without[0]
    return Trial(
        deletion=without[:points],
        insertion=only[:points],
        comprehensiveness=float((whole - without[points:]).mean()),
        sufficiency=float((whole - only[points:]).mean()),
    )


def _area(curve: Array) -> float:
    return float(numpy.trapezoid(curve, dx=1.0 / (len(curve) - 1)))

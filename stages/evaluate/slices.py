"""Parts of the test texts that are judged apart: where did compression hurt?

A slice is a value of a column of the user's, the texts that a pattern of the user's finds, a label, or a group by
length or by rarity of the words. Slices overlap, and with many of them some look bad by chance: the p-values are
corrected by Holm's method (1979, "A Simple Sequentially Rejective Multiple Test Procedure"), which holds whatever the
overlap.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pandas
from scipy.stats import binom, norm

from stages.core.metrics import Array
from stages.core.params import RuleParams, SliceParams
from stages.core.statistics import holm
from stages.core.texts import comparable, words

Kind = Literal["column", "rule", "label", "length", "rarity"]
MATCHES, OTHERS, MISSING = "matches", "others", "missing"


@dataclass(frozen=True)
class Grouping:
    """One way to share out the texts."""

    kind: Kind
    name: str
    """Of the column or the rule; the kind again for groups of this module's own."""
    groups: Array
    """Name of each text's group, [texts]."""
    shown: tuple[str, ...]
    """Groups that become slices, in their order; what a rule does not match is a group and no slice."""


@dataclass(frozen=True)
class Texts:
    """What groupings are made of."""

    texts: Sequence[str]
    labels: Sequence[str]
    """Name of each text's label."""
    lengths: Sequence[int]
    """In tokens."""
    columns: Mapping[str, Sequence[str]]
    """The user's, by name."""
    training: Sequence[str]
    """Texts that tell how rare a word is."""


def make_groupings(texts: Texts, params: SliceParams) -> list[Grouping]:
    """Share out the texts in every way there is: the user's columns and rules, then label, length and rarity."""
    by_length = _in_ranges(numpy.asarray(texts.lengths, dtype=float), params.groups, "tokens")
    by_rarity = _ranked(numpy.array(log_frequencies(texts.texts, texts.training)), params.groups)
    return [
        *(_by_column(name, values, params) for name, values in texts.columns.items()),
        *(_by_rule(rule, texts.texts) for rule in params.rules),
        _grouping("label", "label", texts.labels, sorted(set(texts.labels))),
        _grouping("length", "length", *by_length),
        _grouping("rarity", "rarity", *by_rarity),
    ]


def log_frequencies(texts: Sequence[str], training: Sequence[str]) -> list[float]:
    """Mean natural logarithm of the frequency of a text's words among the training texts' (one added to each count)."""
    counts = Counter(word for text in training for word in words(comparable(text)))
    total = sum(counts.values()) + len(counts) + 1
    found = [words(comparable(text)) or [""] for text in texts]
    return [sum(math.log((counts[word] + 1) / total) for word in each) / len(each) for each in found]


def judge_slices(
    groupings: Sequence[Grouping],
    variant: Array,
    reference: Array,
    labels: Array,
    smallest: int,
    confidence: float,
) -> pandas.DataFrame:
    """Compare two models on each slice, by the share of right answers.

    Args:
        groupings: of `make_groupings`.
        variant: predicted classes, [texts].
        reference: predicted classes of the fine-tuned model, [texts].
        labels: true classes, [texts].
        smallest: slices of fewer texts are listed and not judged.
        confidence: of the intervals; a slice is hurt where the corrected p-value is below the rest to 1.

    Returns:
        a row a slice: `kind`, `name`, `value`, `texts`, `accuracy`, `reference_accuracy`, `difference` with `low` and
        `high`, `lost` and `gained` (answers that were right, and that are right now), `p` (exact, one-sided: as many
        lost answers by chance), `p_holm`, `judged`, `hurt`. Hurt ones come first, then those judged, by difference.
    """
    right, was_right = variant == labels, reference == labels
    rows = [
        {
            "kind": grouping.kind,
            "name": grouping.name,
            "value": value,
            **_compare(right[inside], was_right[inside], confidence),
        }
        for grouping in groupings
        for value in grouping.shown
        for inside in [grouping.groups == value]
    ]
    table = pandas.DataFrame(rows)
    table["judged"] = table["texts"] >= smallest
    table["p_holm"] = math.nan
    table.loc[table["judged"], "p_holm"] = holm(table.loc[table["judged"], "p"].to_numpy())
    table["hurt"] = table["p_holm"] < 1.0 - confidence
    order = ["hurt", "judged", "difference", "p"]
    return table.sort_values(order, ascending=[False, False, True, True], kind="stable", ignore_index=True)


def summarize_slices(table: pandas.DataFrame) -> dict[str, Any]:
    """Sum up `judge_slices`: how many slices were looked at, judged and hurt, and the worst."""
    judged = table[table["judged"]]
    summary: dict[str, Any] = {
        "looked_at": len(table),
        "judged": len(judged),
        "hurt": int(table["hurt"].sum()),
        "worst": None,
    }
    if len(judged):
        first = judged.iloc[0]
        summary["worst"] = title_of(first["kind"], first["name"], first["value"])
        summary["worst_difference"] = float(first["difference"])
    return summary


def title_of(kind: str, name: str, value: str) -> str:
    """Name a slice for people: `country: France`, `has a digit`, `length: 5 to 8 tokens`."""
    return name if kind == "rule" else f"{name}: {value}"


def paired_interval(lost: int, gained: int, texts: int, confidence: float) -> tuple[float, float]:
    """Interval of a difference of two shares on the same texts (Bonett & Price 2012, one added to each change).

    The bootstrap would give a slice of ten texts without a change an interval of no width; this one stays honest.
    """
    down, up = (lost + 1) / (texts + 2), (gained + 1) / (texts + 2)
    reach = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((down + up - (up - down) ** 2) / (texts + 2))
    return max(-1.0, up - down - reach), min(1.0, up - down + reach)


def _compare(right: Array, was_right: Array, confidence: float) -> dict[str, Any]:
    count, lost, gained = len(right), int((was_right & ~right).sum()), int((right & ~was_right).sum())
    low, high = paired_interval(lost, gained, count, confidence)
    return {
        "texts": count,
        "accuracy": float(right.mean()) if count else math.nan,
        "reference_accuracy": float(was_right.mean()) if count else math.nan,
        "difference": (gained - lost) / count if count else math.nan,
        "low": low,
        "high": high,
        "lost": lost,
        "gained": gained,
        "p": float(binom.sf(lost - 1, lost + gained, 0.5)),
    }


def _grouping(kind: Kind, name: str, groups: Sequence[str], shown: Sequence[str]) -> Grouping:
    return Grouping(kind, name, numpy.array(groups, dtype=object), tuple(shown))


def _by_rule(rule: RuleParams, texts: Sequence[str]) -> Grouping:
    pattern = re.compile(rule.pattern)
    groups = [MATCHES if pattern.search(text) else OTHERS for text in texts]
    return _grouping("rule", rule.name, groups, [MATCHES])


def _by_column(name: str, values: Sequence[str], params: SliceParams) -> Grouping:
    """Group by value; by range where a column holds many numbers; rare values together where it holds many others."""
    named = [value or MISSING for value in values]
    counts = Counter(named)
    if len(counts) <= params.column_values:
        return _grouping("column", name, named, [value for value, _ in counts.most_common()])
    numbers = _numbers([value for value in values if value])
    if numbers is not None:
        ranges, shown = _in_ranges(numbers, params.groups)
        found = iter(ranges)
        groups = [next(found) if value else MISSING for value in values]
        return _grouping("column", name, groups, [*shown, *([MISSING] if MISSING in counts else [])])
    frequent = [value for value, _ in counts.most_common(params.column_values)]
    groups = [value if value in frequent else OTHERS for value in named]
    return _grouping("column", name, groups, [*dict.fromkeys([*frequent, OTHERS])])


def _numbers(values: Sequence[str]) -> Array | None:
    try:
        numbers = numpy.array(list(map(float, values)))
    except ValueError:
        return None
    return numbers if numpy.isfinite(numbers).all() else None


def _in_ranges(values: Array, groups: int, unit: str = "") -> tuple[list[str], list[str]]:
    """Name the range of each value, and all ranges from low to high."""
    places = _places(values, groups)
    names = {}
    for place in sorted(set(places)):
        low, high = values[places == place].min(), values[places == place].max()
        names[place] = " ".join(filter(None, [f"{low:g}" if low == high else f"{low:g} to {high:g}", unit]))
    return [names[place] for place in places], list(names.values())


def _ranked(values: Array, groups: int) -> tuple[list[str], list[str]]:
    places = _places(values, groups)
    present = sorted(set(places))
    names = {place: f"{rank} of {len(present)}" for rank, place in enumerate(present, start=1)}
    if len(present) > 1:
        names[present[0]] += ", rarest words"
        names[present[-1]] += ", commonest words"
    return [names[place] for place in places], list(names.values())


def _places(values: Array, groups: int) -> Array:
    """Number of each value's group; equal values share one, so that there may be fewer groups."""
    edges = numpy.unique(numpy.quantile(values, numpy.arange(1, groups) / groups))
    places: Array = numpy.searchsorted(edges, values, side="left")
    return places

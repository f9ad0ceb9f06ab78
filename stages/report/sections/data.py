"""The texts: how many, how long, and what cleaning removed or changed."""

from __future__ import annotations

from typing import Any

import pandas

from stages.core.params import Params
from stages.report import plots
from stages.report.drawing import style
from stages.report.sections import Section
from stages.report.sources import Inputs, read_table

_EXAMPLES = ("example_before", "example_after_or_detail")
"""Columns of the cleaning rules: a text as it came, and what became of it or what it collided with."""


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the data."""
    rules = read_table(inputs["clean"] / "rules.csv", "rule", "split", "count", *_EXAMPLES).astype({"count": int})
    lengths = read_table(inputs["tokenize"] / "lengths.csv", "split", "length", "count")
    lengths = lengths.astype({"length": int, "count": int})
    with style("draw"):
        figures = {"lengths": plots.lengths(lengths)}
    found = _rules(rules)
    splits = _splits(lengths)
    sizes = ", ".join(f"{split['texts']:,} {split['name']}" for split in splits)
    return Section(
        identifier="data",
        title="Data",
        summary=f"Texts: {sizes}. {len(found)} cleaning rules found something.",
        context={
            "splits": splits,
            "rules": found,
            "rule_splits": list(dict.fromkeys(rules["split"])),
            "maximum_length": params.tokenize.maximum_length,
        },
        figures=figures,
        descriptions={"lengths": f"Histogram of tokens per text, up to {lengths['length'].max()}"},
    )


def _rules(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """A row per cleaning rule that found something: counts by split, and the first example."""
    found = []
    for name, rows in table[table["count"] > 0].groupby("rule", sort=False):
        before, after = (rows[column].iloc[0] for column in _EXAMPLES)
        counts = dict(zip(rows["split"], rows["count"], strict=True))
        found.append({"rule": name, "counts": counts, "before": before, "after": after})
    return found


def _splits(lengths: pandas.DataFrame) -> list[dict[str, Any]]:
    """Texts, and median and largest length in tokens, of every split."""
    found = []
    for name, table in lengths.groupby("split", sort=False):
        ordered = table.sort_values("length")
        half = ordered["count"].sum() / 2
        median = ordered["length"][ordered["count"].cumsum() >= half].iloc[0]
        found.append(
            {"name": name, "texts": ordered["count"].sum(), "median": median, "longest": ordered["length"].max()}
        )
    return found

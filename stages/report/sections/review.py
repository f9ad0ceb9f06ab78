"""The texts most worth the look of an expert, and how to correct their labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.core.artifacts import read_json
from stages.core.params import Params
from stages.core.stage import METRICS
from stages.core.tables import read_table
from stages.report.sections import Section

_SHOWN = 15
_WORDS = {
    "flip": "the compressed model answers otherwise",
    "label_doubt": "the label is in doubt",
    "low_confidence": "the compressed model is unsure",
}


def section(inputs: Mapping[str, Path], params: Params) -> Section | None:
    """Show the first rows of review.csv; None where there is no stage `review`."""
    if "review" not in inputs:
        return None
    metrics = read_json(inputs["review"] / METRICS)
    rows = read_table(inputs["review"] / "review.csv", "csv", "utf-8").to_dict("records")
    corrections = read_json(inputs["clean"] / METRICS).get("corrections", {})
    reasons = [(_WORDS[name], name, count) for name, count in metrics["reasons"].items()]
    told = ", ".join(f"{count} because {words}" for words, _, count in reasons if count)
    return Section(
        identifier="review",
        title="Texts for an expert to look at",
        summary=f"{len(rows)} texts are worth a look{': ' + told if told else ''}.",
        context={
            "rows": rows[:_SHOWN],
            "texts": len(rows),
            "reasons": reasons,
            "doubts": metrics["label_doubts"],
            "noise": metrics["estimated_noise"],
            "limit": params.review.low_confidence,
            "corrections": corrections if corrections.get("file") else None,
        },
    )

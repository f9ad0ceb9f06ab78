"""Which recipes of quantization were tried, and why each was taken or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.core.params import Params
from stages.report.sections import Section
from stages.report.sources import Inputs, read_metrics

_STAGES = {"quantize": "the pruned model", "quantize_finetuned": "the fine-tuned model"}
"""What each quantize stage was given."""


def section(inputs: Inputs, params: Params) -> Section | None:
    """Tell every attempt of every quantize stage."""
    found = {what: read_metrics(inputs, stage) for stage, what in _STAGES.items() if stage in inputs}
    told = {what: metrics for what, metrics in found.items() if "recipe" in metrics}
    if not told:
        return None
    taken = "; ".join(f"{what} takes {metrics['recipe']}" for what, metrics in told.items())
    return Section(
        identifier="quantization",
        title="Attempts of quantization",
        summary=f"{taken[0].upper()}{taken[1:]}.",
        context={
            "stages": {what: attempts(metrics) for what, metrics in told.items()},
            "gate": params.quantize.gate,
            "metric": params.quality.metric.replace("_", " "),
        },
    )


def attempts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the recipes in the order tried, each with its figures and why it failed; no reason for the one taken.

    Where every attempt failed the model stays in float; that stands last, without figures.
    """
    tried = sorted(metrics["attempts"].items(), key=lambda item: int(item[1]["place"]))
    found = [{"recipe": name, **attempt} for name, attempt in tried]
    taken = {"recipe": metrics["recipe"], "reason": "", "loss": None}
    return found if metrics["recipe"] in metrics["attempts"] else [*found, taken]

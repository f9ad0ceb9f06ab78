"""The cascade: what it passes on, and what passing fewer texts on would lose."""

from __future__ import annotations

from stages.core.params import Params
from stages.report import plots
from stages.report.drawing import style
from stages.report.sections import Section
from stages.report.sources import Inputs, read_evaluations, read_metrics, read_numbers


def section(inputs: Inputs, params: Params) -> Section | None:
    """Tell the cascade's trade-off."""
    if "cascade" not in inputs:
        return None
    chosen = read_metrics(inputs, "cascade")["chosen"]
    trade_off = read_numbers(inputs["cascade"] / "trade_off.csv", "passed_on", "difference", "low", "high", "cost")
    passed_on = read_evaluations(inputs).get("cascade", {}).get("passed_on")
    with style("draw"):
        figures = {"cascade": plots.trade_off(trade_off, chosen, params.cascade.tolerated_loss)}
    told = f"Passes {chosen['passed_on']:.1%} of the validation texts on to the larger model."
    return Section(
        identifier="cascade",
        title="The cascade",
        summary=told if params.cascade.enabled else "Turned off in params.yaml.",
        context={"settings": params.cascade, "chosen": chosen, "passed_on": passed_on},
        figures=figures,
        descriptions={
            "cascade": "What the cascade loses against its larger model, over the share of the texts that it passes on"
        },
    )

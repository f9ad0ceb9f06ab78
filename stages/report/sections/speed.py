"""Latency and throughput of every model on every runtime."""

from __future__ import annotations

from stages.core.ladder import TITLES
from stages.core.params import Params
from stages.report import plots
from stages.report.drawing import style
from stages.report.sections import Section
from stages.report.sources import Inputs, read_evaluations


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the speed per runtime."""
    evaluations = read_evaluations(inputs)
    latencies = {
        variant: {name: runtime["latency_ms"] for name, runtime in found["runtimes"].items()}
        for variant, found in evaluations.items()
    }
    throughputs = {
        TITLES[variant]: found["runtimes"][found["best"]["throughput_runtime"]]["texts_per_second"]
        for variant, found in evaluations.items()
    }
    with style("draw"):
        figures = {"latency": plots.latency(latencies, TITLES), "throughput": plots.throughput(throughputs)}
    runtimes = list(dict.fromkeys(name for found in evaluations.values() for name in found["runtimes"]))
    return Section(
        identifier="speed",
        title="Speed per runtime",
        summary=f"Latency and throughput on {', '.join(runtimes)}; the fastest counts.",
        context={"evaluations": evaluations},
        figures=figures,
        descriptions={
            "latency": "Latency at batch 1 from p50 to p99 for every model and runtime; the figures are in the table",
            "throughput": "Texts per second against batch size for every model on its fastest runtime",
        },
    )

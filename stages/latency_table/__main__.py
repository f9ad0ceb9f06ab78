"""Command line of the latency_table stage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from stages.core.checkpoints import load_model
from stages.core.examples import load_examples, load_pad_id
from stages.core.latency import Deployment, LatencyTable, workload, write_table
from stages.core.params import Params
from stages.core.stage import StageRun, command
from stages.core.structure import LayerWidth, encoder_layers, head_size, layer_widths
from stages.latency_table.graphs import EncoderShape
from stages.latency_table.measure import measure_table


def run_latency_table(run: StageRun) -> dict[str, Any]:
    """Measure the table, or write an empty one where pruning has no target."""
    table = None
    if run.params.prune.speedup is None:
        run.say("prune.speedup is null, so nothing needs to be measured")
    else:
        table = _measure(run, load_model(run.inputs["model"]))
        run.say(f"{table.runtime} is the deployment runtime; {_describe(table)}")
    write_table(table, run.unit("table"))
    return {"table": None if table is None else asdict(table)}


def _measure(run: StageRun, model: nn.Module) -> LatencyTable:
    params, data = run.params.prune, run.inputs["data"]
    config: Any = model.config
    widths = layer_widths(model)
    shape = EncoderShape(
        hidden=config.hidden_size,
        head_size=head_size(encoder_layers(model)[0]),
        classes=config.num_labels,
        deployment=_deployment(run.params),
    )
    largest = LayerWidth(max(width.heads for width in widths), max(width.neurons for width in widths))
    batches = workload(load_examples(data, "train"), params.goal, load_pad_id(data), run.params.seed)
    return measure_table(shape, largest, params.neuron_multiple, params.runtime, params.goal, batches, run.params.seed)


def _deployment(params: Params) -> Deployment:
    """What params make of a pruned model; recipes that multiply in float are timed in float."""
    quantized = params.quantize.multiplies_in_int8()
    return Deployment(quantized, quantized and params.quantize.embeddings == "int8", params.export.opset)


def _describe(table: LatencyTable) -> str:
    """Say what a layer costs, in microseconds a text."""
    heads, neurons = max(table.heads), max(table.neurons)
    return (
        f"microseconds a text: {table.attention_seconds(heads) * 1e6:.1f} for {heads} heads, "
        f"{table.feed_forward_seconds(neurons) * 1e6:.1f} for {neurons} neurons, "
        f"{table.shell * 1e6:.1f} for what stays of a layer, {table.rest * 1e6:.1f} for the rest"
    )


if __name__ == "__main__":
    command("latency_table", run_latency_table, inputs=("model", "data"))

"""Command line of the export stage."""

from __future__ import annotations

from typing import Any

from stages.core.artifacts import write_json
from stages.core.checkpoints import HEADROOM_FILE, copy_tokenizer, count_parameters, extend_lineage, load_model
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_labels, load_maximum_length, load_pad_id, sample
from stages.core.onnx_graph import export_onnx
from stages.core.quantized import QuantizedLinear
from stages.core.stage import StageRun, command
from stages.core.tasks import get_task
from stages.export.parity import largest_difference


def run_export(run: StageRun) -> dict[str, Any]:
    """Export a checkpoint and hold it against PyTorch."""
    params, data = run.params.export, run.inputs["data"]
    task, pad_id = get_task(run.params.task.kind), load_pad_id(data, run.inputs["model"])
    model = load_model(run.inputs["model"])
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())

    folder = run.unit("model")
    path = folder / "model.onnx"
    proto = export_onnx(model, path, task.onnx_inputs, task.onnx_output, params.opset)
    texts = sample(load_examples(data, "validation", run.inputs["model"]), params.parity_texts, run.params.seed)
    difference = largest_difference(model, path, texts.input_ids, pad_id, task.onnx_inputs)
    tolerance = params.quantized_tolerance if quantized else params.tolerance
    run.say(f"largest difference of a logit from PyTorch {difference:.2g}, tolerated {tolerance:.2g}")
    if not difference <= tolerance:
        raise UserError(
            f"{run.inputs['model']}: ONNX Runtime and PyTorch differ by {difference:.3g} in a logit, "
            f"tolerated {tolerance:.3g}; nothing was exported"
        )
    copy_tokenizer(run.inputs["model"], folder)
    description = {
        "task": run.params.task.kind,
        "labels": load_labels(data),
        "maximum_length": load_maximum_length(data),
        "pad_id": pad_id,
        "inputs": list(task.onnx_inputs),
        "output": task.onnx_output,
        "quantized": quantized,
        "parameters": count_parameters(model),
        "lineage": extend_lineage(run.inputs["model"], run.name),
    }
    write_json(folder / HEADROOM_FILE, description)
    return {
        "parameters": count_parameters(model),
        "model_bytes": path.stat().st_size,
        "nodes": len(proto.graph.node),
        "largest_difference": difference,
    }


if __name__ == "__main__":
    command("export", run_export, inputs=("model", "data"), variants=True)

"""Command line of the export stage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.core.artifacts import write_json
from stages.core.checkpoints import HEADROOM_FILE, copy_tokenizer, count_parameters, extend_lineage, load_model
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_labels, load_maximum_length, load_pad_id, sample
from stages.core.onnx_graph import export_onnx
from stages.core.quantized import is_quantized, weight_bits
from stages.core.stage import StageRun, command
from stages.core.tasks import get_task
from stages.export.fusion import Fusion, count_int8_products, fuse_onnxruntime, fuse_openvino
from stages.export.parity import largest_difference
from stages.export.size import expected_bytes, largest_bytes


def run_export(run: StageRun) -> dict[str, Any]:
    """Export a checkpoint and hold it against PyTorch."""
    params, data = run.params.export, run.inputs["data"]
    task, pad_id = get_task(run.params.task.kind), load_pad_id(data, run.inputs["model"])
    model = load_model(run.inputs["model"])
    quantized = is_quantized(model)

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
    model_bytes = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    hold_size(model_bytes, largest_bytes(model, len(proto.graph.node), params.size_allowance), run.inputs["model"])
    int8_products = count_int8_products(proto.graph)
    fusions = {"onnxruntime": fuse_onnxruntime(path), "openvino": fuse_openvino(path)}
    for name, fusion in fusions.items():
        run.say(describe(name, fusion, int8_products))
        hold_fusion(name, fusion, int8_products, params.int8_fused, run.inputs["model"])
    copy_tokenizer(run.inputs["model"], folder)
    description = {
        "task": run.params.task.kind,
        "labels": load_labels(data),
        "maximum_length": load_maximum_length(data),
        "pad_id": pad_id,
        "inputs": list(task.onnx_inputs),
        "output": task.onnx_output,
        "quantized": quantized,
        "weight_bits": weight_bits(model),
        "parameters": count_parameters(model),
        "lineage": extend_lineage(run.inputs["model"], run.name),
    }
    write_json(folder / HEADROOM_FILE, description)
    return {
        "parameters": count_parameters(model),
        "model_bytes": model_bytes,
        "tensor_bytes": expected_bytes(model),
        "nodes": len(proto.graph.node),
        "int8_products": int8_products,
        "fused": {name: asdict(fusion) for name, fusion in fusions.items()},
        "largest_difference": difference,
    }


def describe(runtime: str, fusion: Fusion, int8_products: int) -> str:
    """One line about what a runtime fused."""
    return (
        f"{runtime}: {fusion.nodes} nodes; fused {fusion.attention} attention, {fusion.layer_norm} layer norm, "
        f"{fusion.gelu} GELU, {fusion.int8_products} of {int8_products} int8 products"
    )


def hold_fusion(runtime: str, fusion: Fusion, int8_products: int, share: float, where: Path) -> None:
    """Refuse a graph whose int8 products a runtime would compute in float.

    Raises:
        UserError: if less than `share` of them fuse.
    """
    if fusion.int8_products < share * int8_products:
        raise UserError(
            f"{where}: {runtime} computes {fusion.int8_products} of {int8_products} int8 products in integers, "
            f"export.int8_fused wants {share:.0%}; nothing was exported. an empty quantize.recipes exports floats"
        )


def hold_size(model_bytes: int, largest: int, where: Path) -> None:
    """Refuse a file that holds more than the model.

    Raises:
        UserError: if it is larger than `largest`.
    """
    if model_bytes > largest:
        raise UserError(
            f"{where}: the ONNX file takes {model_bytes} bytes where its tensors and graph explain {largest}; "
            "nothing was exported. export.size_allowance is the share that may be added"
        )


if __name__ == "__main__":
    command("export", run_export, inputs=("model", "data"), variants=True)

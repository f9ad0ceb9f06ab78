"""Which operations do the runtimes fuse?

A graph may be right and slow: where a runtime does not recognize a pattern it computes the parts one by one, and int8
weights become float again before every product (onnxruntime#20052). So the nodes are counted before and after each
runtime's optimizer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from stages.core.onnx_graph import weights_made_when_loaded
from stages.core.runtimes import openvino_core, read_for_openvino

_PRODUCTS = ("MatMul", "Gemm")
_DEQUANTIZE = "DequantizeLinear"
_INT8 = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
_INTEGER_PRODUCTS = (
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QLinearMatMul",
    "QGemm",
    "QAttention",
)


@dataclass(frozen=True)
class Fusion:
    """What a runtime made of a graph; counts of nodes."""

    nodes: int
    attention: int
    layer_norm: int
    gelu: int
    int8_products: int
    """Matrix products of integers."""


def count_int8_products(graph: onnx.GraphProto) -> int:
    """Count the products of quantized activations with int8 weights, which a runtime should compute in integers."""
    producers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type in _INT8}
    weights |= set(weights_made_when_loaded(graph))

    def quantized(name: str, constant: bool) -> bool:
        node = producers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Flatten", "Unsqueeze"):
            node = producers.get(node.input[0])
        return node is not None and node.op_type == _DEQUANTIZE and (node.input[0] in weights) == constant

    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    return sum(quantized(node.input[0], False) and quantized(node.input[1], True) for node in products)


def fuse_onnxruntime(path: Path) -> Fusion:
    """Let ONNX Runtime optimize a graph for the CPU, and count. Attention counts where it is one node."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        # The last level changes how data lies in memory, for the machine at hand.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return Fusion(
        nodes=kinds.total(),
        attention=_sum(kinds, ("Attention", "MultiHeadAttention", "QAttention")),
        layer_norm=_sum(kinds, ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization")),
        gelu=_sum(kinds, ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")),
        int8_products=_sum(kinds, _INTEGER_PRODUCTS),
    )


def fuse_openvino(path: Path) -> Fusion:
    """Let OpenVINO compile a graph for the CPU, and count.

    Attention counts where its two products and the softmax are one `Subgraph` or one `ScaledDotProductAttention`;
    GELU where it is part of a product, so that no node of its own is left.
    """
    compiled = openvino_core().compile_model(read_for_openvino(path), "CPU")
    operations = [_describe(operation) for operation in compiled.get_runtime_model().get_ops()]
    work = [entry for entry in operations if entry["layerType"] not in ("Const", "Input", "Output")]
    names = Counter(kind for entry in work for kind in _origins(entry))
    return Fusion(
        nodes=len(work),
        attention=sum(_is_attention(entry) for entry in work),
        layer_norm=sum(entry["layerType"] == "MVN" for entry in work),
        gelu=names["gelu"],
        int8_products=sum(
            entry["layerType"] == "FullyConnected" and entry["runtimePrecision"] in ("u8", "i8") for entry in work
        ),
    )


def _sum(kinds: Mapping[str, int], names: tuple[str, ...]) -> int:
    return sum(kinds.get(name, 0) for name in names)


def _describe(operation: Any) -> dict[str, str]:
    """OpenVINO's own words about an operation: what it is, in which precision, and which nodes it came from."""
    known = operation.get_rt_info()
    return {
        key: known[key].astype(str) if key in known else ""
        for key in ("layerType", "runtimePrecision", "originalLayersNames")
    }


def _origins(entry: Mapping[str, str]) -> list[str]:
    """Kinds of the ONNX nodes in an operation, such as gelu of `node_gelu_3`; several may share one operation."""
    if entry["layerType"] != "FullyConnected":
        return []
    return ["gelu" for name in entry["originalLayersNames"].split(",") if "gelu" in name.lower()]


def _is_attention(entry: Mapping[str, str]) -> bool:
    if entry["layerType"] == "ScaledDotProductAttention":
        return True
    return entry["layerType"] == "Subgraph" and "softmax" in entry["originalLayersNames"].lower()

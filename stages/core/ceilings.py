"""What the machine can do at most, measured: matrix products in three precisions, and memory bandwidth.

And how much of it a model uses: its arithmetic per text, read from its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import onnx

from stages.core.onnx_graph import weights_made_when_loaded
from stages.core.products import SIZE, fastest_seconds

_BYTES = 512 * 2**20
_GIGA = 1e9
_POOLING = ("Gather", "Slice", "GatherND")
_BYPASSED = ("Shape", "Constant")
_WEIGHT_CARRIERS = ("DequantizeLinear", "Transpose", "Cast", "Identity")
_LAYOUT = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FIRST_INPUT_ONLY = ("Reshape", "Expand", "Slice", "Squeeze", "Unsqueeze", "Gather")


def measure_ceilings() -> dict[str, float]:
    """Measure `measure_products`, and as `bandwidth` gigabytes a second to and from memory."""
    return {**measure_products(), "bandwidth": _bandwidth()}


def measure_products() -> dict[str, float]:
    """Measure giga-operations a second of products of square matrices, on all threads that PyTorch was given.

    The best of what is installed counts: PyTorch (oneDNN) for `fp32` and `bf16`; for `int8` PyTorch or ONNX Runtime.
    Takes about two seconds.
    """
    import torch

    def product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
        return lambda: left @ right

    floats = torch.randn(SIZE, SIZE)
    halves = floats.to(torch.bfloat16)
    integers = torch.randint(-127, 127, (SIZE, SIZE), dtype=torch.int8)
    work = 2.0 * SIZE**3
    return {
        "fp32": work / fastest_seconds(product(floats, floats)) / _GIGA,
        "bf16": work / fastest_seconds(product(halves, halves)) / _GIGA,
        "int8": work
        / min(fastest_seconds(lambda: torch._int_mm(integers, integers)), fastest_seconds(_integer_product()))
        / _GIGA,
    }


def operations_per_text(path: Path, tokens: float) -> float:
    """Count the operations of a text of a mean number of tokens, of both kinds of `operations_by_kind` together."""
    return sum(operations_by_kind(path, tokens).values())


def operations_by_kind(path: Path, tokens: float) -> dict[str, float]:
    """Count the operations (a multiplication and an addition are two) of a text of a mean number of tokens.

    Products of activations with weights count: once per token, or once per text behind the selection of the first
    token. Products among activations (attention's scores) do not; at a few dozen tokens they are below one percent.

    Args:
        path: of the ONNX file.
        tokens: of a text.

    Returns:
        `int8`: products of quantized activations with quantized weights; `float`: all others, those with weights that
        are only stored in fewer bits included.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    sources = {output: node for node in graph.node for output in node.output}
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer} | weights_made_when_loaded(graph)
    pooled: set[str] = set()
    total = {"float": 0.0, "int8": 0.0}
    for node in graph.node:  # ONNX keeps nodes in topological order
        data = node.input[:1] if node.op_type in _FIRST_INPUT_ONLY else node.input
        selects = node.op_type in _POOLING and not _weight(node.input[0], shapes, sources) and _floating(node, sources)
        behind = selects or any(name in pooled for name in data)
        if behind and node.op_type not in _BYPASSED:
            pooled.update(node.output)
        if "MatMul" in node.op_type or node.op_type in ("Gemm", "Attention"):
            weights = [shape for name in node.input if len(shape := _weight(name, shapes, sources)) == 2]
            kind = "int8" if _multiplies_integers(node, sources) else "float"
            total[kind] += float(sum(2.0 * numpy.prod(shape) * (1.0 if behind else tokens) for shape in weights))
    return total


def _multiplies_integers(node: onnx.NodeProto, sources: dict[str, onnx.NodeProto]) -> bool:
    """Whether both factors are quantized: runtimes then compute the product in integers."""
    return "Integer" in node.op_type or all(_dequantized(name, sources) for name in node.input[:2])


def _dequantized(name: str, sources: dict[str, onnx.NodeProto]) -> bool:
    node = sources.get(name)
    while node is not None and node.op_type in _LAYOUT:
        node = sources.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _floating(node: onnx.NodeProto, sources: dict[str, onnx.NodeProto]) -> bool:
    """Whether a selection takes from activations rather than from a shape or the inputs."""
    source = sources.get(node.input[0])
    return source is not None and source.op_type not in ("Shape", "Cast")


def _weight(name: str, shapes: dict[str, list[int]], sources: dict[str, onnx.NodeProto]) -> list[int]:
    """Shape of the constant behind a tensor, through what only unpacks it; empty if it is no constant."""
    while name not in shapes and name in sources and sources[name].op_type in _WEIGHT_CARRIERS:
        name = sources[name].input[0]
    return shapes.get(name, [])


def _integer_product() -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper

    weight = numpy.random.default_rng(0).integers(-127, 127, (SIZE, SIZE), dtype=numpy.int8)
    given = numpy.random.default_rng(1).integers(0, 255, (SIZE, SIZE), dtype=numpy.uint8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, [SIZE, SIZE])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, [SIZE, SIZE])],
        [onnx.numpy_helper.from_array(weight, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": given})


def _bandwidth() -> float:
    """Gigabytes a second of a copy by all threads: each byte is read once and written once."""
    import torch

    source = torch.ones(_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * _BYTES / fastest_seconds(lambda: target.copy_(source)) / _GIGA

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
from onnx import TensorProto, helper

from stages.core.ceilings import measure_products, operations_by_kind, operations_per_text

NODES = [
    helper.make_node("Gather", ["embedding", "ids"], ["tokens"]),
    helper.make_node("MatMul", ["tokens", "first"], ["hidden"]),
    helper.make_node("Gather", ["hidden", "zero"], ["pooled"], axis=1),
    helper.make_node("MatMul", ["pooled", "second"], ["logits"]),
]


def save(path: Path, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> Path:
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        tensors,
    )
    onnx.save(helper.make_model(graph), str(path))
    return path


def tensor(name: str, shape: tuple[int, ...], kind: str = "float32") -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(numpy.ones(shape, kind), name)


@pytest.fixture
def tensors() -> list[onnx.TensorProto]:
    zero = onnx.numpy_helper.from_array(numpy.array(0), "zero")
    return [tensor("embedding", (50, 4)), tensor("first", (4, 6)), tensor("second", (6, 3)), zero]


def test_operations_count_tokens_before_the_selection_and_texts_after_it(
    tmp_path: Path, tensors: list[onnx.TensorProto]
) -> None:
    path = save(tmp_path / "model.onnx", NODES, tensors)
    assert operations_per_text(path, tokens=10.0) == 2 * 4 * 6 * 10 + 2 * 6 * 3


def test_only_products_of_two_quantized_factors_are_integer_ones(
    tmp_path: Path, tensors: list[onnx.TensorProto]
) -> None:
    quantized = [
        NODES[0],
        helper.make_node("QuantizeLinear", ["tokens", "scale"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["packed_first", "scale"], ["first"]),
        helper.make_node("MatMul", ["rounded", "first"], ["hidden"]),
        NODES[2],
        helper.make_node("DequantizeLinear", ["packed_second", "scale"], ["second"]),
        NODES[3],  # weights stored in int8, activations in float
    ]
    packed = [tensor("packed_first", (4, 6), "int8"), tensor("packed_second", (6, 3), "int8"), tensor("scale", ())]
    path = save(tmp_path / "model.onnx", quantized, [tensors[0], *packed, tensors[3]])
    assert operations_by_kind(path, tokens=10.0) == {"int8": 2 * 4 * 6 * 10, "float": 2 * 6 * 3}


def test_ceilings_are_told_for_three_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.core.ceilings.SIZE", 256)
    products = measure_products()
    assert set(products) == {"fp32", "bf16", "int8"}
    assert all(0.1 < rate < 1e6 for rate in products.values())

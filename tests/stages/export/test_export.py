from collections import Counter
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from stages.core.batches import pad
from stages.core.checkpoints import load_model
from stages.core.examples import load_examples
from stages.core.onnx_graph import export_onnx
from stages.core.params import ActivationParams
from stages.core.structure import encoder_layers, keep_parts
from stages.export.parity import largest_difference
from stages.quantize.observe import choose_range, collect_inputs
from stages.quantize.recipes import quantizable_layers, quantize_model

NAMES = ["input_ids", "attention_mask"]
OBSERVER = ActivationParams(observer="minmax", percentile=100.0)


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[list[int]]:
    return load_examples(tiny_data, "validation").input_ids


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Path) -> nn.Module:
    model = load_model(tiny_checkpoint)
    first, second = encoder_layers(model)
    keep_parts(first, torch.tensor([1]), torch.arange(24))
    keep_parts(second, torch.tensor([0, 1, 3]), torch.arange(40))
    return model


@pytest.fixture(scope="module")
def exported(
    pruned: nn.Module, rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[nn.Module, Path]]:
    """A float model of irregular widths, and its static and dynamic int8 versions, as ONNX."""
    names = quantizable_layers(pruned)
    inputs = collect_inputs(pruned, names, rows, 0)
    models = {
        "float": pruned,
        "static": quantize_model(pruned, {name: choose_range(inputs[name], OBSERVER) for name in names}),
        "dynamic": quantize_model(pruned, dict.fromkeys(names)),
    }
    folder = tmp_path_factory.mktemp("onnx")
    for name, model in models.items():
        export_onnx(model, folder / f"{name}.onnx", NAMES, "logits", 20)
    return {name: (model, folder / f"{name}.onnx") for name, model in models.items()}


@pytest.mark.parametrize(("name", "tolerance"), [("float", 1e-5), ("static", 1e-4), ("dynamic", 0.1)])
def test_onnx_computes_what_pytorch_computes(
    name: str, tolerance: float, exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]
) -> None:
    model, path = exported[name]
    assert largest_difference(model, path, rows, 0, NAMES) < tolerance


def test_a_wrong_graph_is_noticed(exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]) -> None:
    assert largest_difference(exported["float"][0], exported["dynamic"][1], rows, 0, NAMES) > 1e-4


def test_batch_and_length_are_dynamic_and_names_are_kept(exported: dict[str, tuple[nn.Module, Path]]) -> None:
    session = onnxruntime.InferenceSession(str(exported["float"][1]), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == NAMES
    assert [value.name for value in session.get_outputs()] == ["logits"]
    for shape in ((1, 1), (3, 20), (17, 2)):
        ids = numpy.full(shape, 7, dtype=numpy.int64)
        assert session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0].shape == (shape[0], 3)


@pytest.mark.parametrize(("name", "operator"), [("static", "QuantizeLinear"), ("dynamic", "DynamicQuantizeLinear")])
def test_quantized_layers_carry_int8_weights(
    name: str, operator: str, exported: dict[str, tuple[nn.Module, Path]]
) -> None:
    proto = onnx.load(exported[name][1])
    layers = 2 * 6 + 1
    assert Counter(node.op_type for node in proto.graph.node)[operator] >= layers - 4  # query, key, value share theirs
    int8 = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(len(tensor.dims) == 2 for tensor in int8) == layers


def test_onnx_runtime_fuses_integer_products(exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(exported["static"][1]), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2 * 6  # the pooler's product is a Gemm, on one token a text


def test_padding_does_not_change_the_answer(exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]) -> None:
    session = onnxruntime.InferenceSession(str(exported["float"][1]), providers=["CPUExecutionProvider"])
    short = min(rows, key=len)
    alone, padded = (
        session.run(None, dict(zip(NAMES, pad([short], 0, length), strict=True)))[0] for length in (None, 24)
    )
    numpy.testing.assert_allclose(alone, padded, atol=1e-5)

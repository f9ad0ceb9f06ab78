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
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.onnx_graph import export_onnx
from stages.core.params import ActivationParams
from stages.core.structure import encoder_layers, keep_parts
from stages.export.__main__ import hold_fusion, hold_size
from stages.export.fusion import Fusion, count_int8_products, fuse_onnxruntime, fuse_openvino
from stages.export.parity import largest_difference
from stages.export.size import expected_bytes, largest_bytes
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


@pytest.mark.parametrize("name", ["float", "static", "dynamic"])
def test_both_runtimes_fuse_the_graph(name: str, exported: dict[str, tuple[nn.Module, Path]]) -> None:
    path = exported[name][1]
    products = count_int8_products(onnx.load(path).graph)
    assert products == (0 if name == "float" else 2 * 6 + 1)
    for fusion in (fuse_onnxruntime(path), fuse_openvino(path)):
        assert (fusion.layer_norm, fusion.gelu) == (2 * 2 + 1, 2)
        # A pooler on a dynamic range loses its place to the fusion of MatMul and Tanh in ONNX Runtime.
        assert fusion.int8_products >= products - (name == "dynamic")
        hold_fusion("", fusion, products, 0.9, path)
    assert fuse_onnxruntime(path).nodes < 85
    assert fuse_openvino(path).attention == 2


def test_int8_products_that_do_not_fuse_are_refused(tmp_path: Path) -> None:
    fusion = Fusion(nodes=9, attention=0, layer_norm=1, gelu=1, int8_products=5)
    hold_fusion("openvino", fusion, 5, 1.0, tmp_path)
    with pytest.raises(UserError, match=r"openvino computes 5 of 6 int8 products in integers, .* wants 90%"):
        hold_fusion("openvino", fusion, 6, 0.9, tmp_path)


@pytest.mark.parametrize("name", ["float", "static", "dynamic"])
def test_the_file_is_as_large_as_its_tensors(name: str, exported: dict[str, tuple[nn.Module, Path]]) -> None:
    model, path = exported[name]
    nodes = len(onnx.load(path).graph.node)
    hold_size(path.stat().st_size, largest_bytes(model, nodes, 0.02), path)
    with pytest.raises(UserError, match=r"the ONNX file takes \d+ bytes where"):
        hold_size(path.stat().st_size + 40_000, largest_bytes(model, nodes, 0.02), path)


def test_tied_tensors_count_once_and_bits_count() -> None:
    first = nn.Linear(3, 5, bias=False)
    second = nn.Linear(3, 5, bias=False)
    second.weight = first.weight
    assert expected_bytes(nn.Sequential(first, second)) == 3 * 5 * 4
    assert expected_bytes(nn.Linear(3, 5).half()) == (3 * 5 + 5) * 2


def test_padding_does_not_change_the_answer(exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]) -> None:
    session = onnxruntime.InferenceSession(str(exported["float"][1]), providers=["CPUExecutionProvider"])
    short = min(rows, key=len)
    alone, padded = (
        session.run(None, dict(zip(NAMES, pad([short], 0, length), strict=True)))[0] for length in (None, 24)
    )
    numpy.testing.assert_allclose(alone, padded, atol=1e-5)

"""Every kind of quantized module in ONNX: the file holds the few bits, and runtimes compute what PyTorch computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from stages.core.batches import pad
from stages.core.ceilings import operations_by_kind
from stages.core.checkpoints import logits_of
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.onnx_graph import export_onnx
from stages.core.params import ActivationParams, WeightOnlyParams
from stages.core.quantized import (
    GroupedLinear,
    HalfEmbedding,
    HalfLinear,
    QuantizedEmbedding,
    QuantizedLinear,
)
from stages.export.fusion import count_int8_products, fuse_openvino
from stages.quantize.groups import round_groups
from stages.quantize.observe import choose_range, collect_inputs
from stages.quantize.recipes import quantizable_layers, with_parts

NAMES = ["input_ids", "attention_mask"]
MINMAX = ActivationParams(observer="minmax", percentile=100.0)
LAYERS, TABLES = 6 + 1, 2  # exported, the token type is a row and no table
WORDS, WIDTH = 100, 128
WEIGHTS_ONLY = WeightOnlyParams(method="nearest", group=16)


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[list[int]]:
    return load_examples(tiny_data, "validation").input_ids


@pytest.fixture(scope="module")
def exported(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """One layer, wide enough that the exporter folds no weight."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=2 * WIDTH,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model, folder = BertForSequenceClassification(config).eval(), tmp_path_factory.mktemp("onnx")
    layers = quantizable_layers(model)
    inputs = collect_inputs(model, layers, rows, 0)
    linears = {name: part for name, part in model.named_modules() if name in layers and isinstance(part, nn.Linear)}
    tables = {name: part for name, part in model.named_modules() if isinstance(part, nn.Embedding)}

    def grouped(name: str, bits: int) -> nn.Module:
        rounded = round_groups(linears[name].weight.detach(), inputs[name], bits, 16, WEIGHTS_ONLY)
        return GroupedLinear.from_levels(linears[name], rounded.levels, rounded.zero_point, rounded.scale, bits)

    def smoothed(name: str, group: int | None = None) -> nn.Module:
        factor = 1.0 / inputs[name].abs().amax(dim=0).sqrt().clamp(min=0.1)
        ranges = choose_range(inputs[name] * factor, MINMAX)
        return QuantizedLinear.from_linear(linears[name], ranges, factor, group=group)

    embeddings = {name: QuantizedEmbedding.from_embedding(table) for name, table in tables.items()}
    parts: dict[str, dict[str, nn.Module]] = {
        "smoothed": {**embeddings, **{name: smoothed(name) for name in layers}},
        "packed": {
            **{name: QuantizedEmbedding.from_embedding(table, 16) for name, table in tables.items()},
            **{name: smoothed(name, 16) for name in layers},
        },
        "int8": {**embeddings, **{name: grouped(name, 8) for name in layers}},
        "int4": {**embeddings, **{name: grouped(name, 4) for name in layers}},
        "half": {
            **{name: HalfEmbedding.from_embedding(part, "fp16") for name, part in tables.items()},
            **{name: HalfLinear.from_linear(part, "bf16") for name, part in linears.items()},
        },
    }
    made = {name: (with_parts(model, chosen), folder / f"{name}.onnx") for name, chosen in parts.items()}
    for changed, path in made.values():
        export_onnx(changed, path, NAMES, "logits", 21)
    return made


# MatMulNBits rounds the inputs of each group to 8 bits as well; OpenVINO computes in float.
@pytest.mark.parametrize(
    ("name", "tolerance"), [("smoothed", 1e-3), ("packed", 1e-3), ("int8", 0.05), ("int4", 0.05), ("half", 1e-4)]
)
def test_onnx_runtime_computes_what_pytorch_computes(
    name: str, tolerance: float, exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]
) -> None:
    model, path = exported[name]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = pad(rows, 0)
    wanted = logits_of(model, {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}).numpy()
    given = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    assert numpy.abs(given - wanted).max() < tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 1e-3), ("int4", 1e-3), ("half", 1e-3)])
def test_openvino_computes_what_pytorch_computes(
    name: str, tolerance: float, exported: dict[str, tuple[nn.Module, Path]], rows: list[list[int]]
) -> None:
    model, path = exported[name]
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.compile_model(str(path), "CPU", options)
    ids, mask = pad(rows[:4], 0)
    wanted = logits_of(model, {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}).numpy()
    given = next(iter(compiled([ids, mask]).values()))
    assert numpy.abs(given - wanted).max() < tolerance


@pytest.mark.parametrize(
    ("name", "kind", "linears"),
    [
        ("smoothed", onnx.TensorProto.INT8, LAYERS),
        ("int8", onnx.TensorProto.UINT8, 2 * LAYERS),  # with zero points
        ("int4", onnx.TensorProto.UINT4, 2 * LAYERS),
        ("half", onnx.TensorProto.BFLOAT16, LAYERS),
        ("half", onnx.TensorProto.FLOAT16, TABLES),
    ],
)
def test_the_file_holds_the_few_bits(
    name: str, kind: int, linears: int, exported: dict[str, tuple[nn.Module, Path]]
) -> None:
    tensors = onnx.load(exported[name][1]).graph.initializer
    matrices = [tensor for tensor in tensors if len(tensor.dims) == 2]
    assert sum(tensor.data_type == kind for tensor in matrices) >= linears
    if name != "half":
        assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in matrices) >= TABLES
    large = [
        tensor.name
        for tensor in matrices
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims[0] * tensor.dims[1] >= WIDTH * WIDTH
    ]
    assert large == []


def test_onnx_runtime_never_makes_the_table_of_words_float(
    exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    for name, kind in (("int8", onnx.TensorProto.INT8), ("half", onnx.TensorProto.FLOAT16)):
        graph = _optimized(exported[name][1], tmp_path).graph
        assert [tensor.data_type for tensor in graph.initializer if list(tensor.dims) == [WORDS, WIDTH]] == [kind]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_onnx_runtime_fuses_weights_in_groups(
    name: str, exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    kinds = Counter(node.op_type for node in _optimized(exported[name][1], tmp_path).graph.node)
    assert kinds["MatMulNBits"] == LAYERS
    assert kinds["DequantizeLinear"] == 0


@pytest.mark.parametrize("name", ["smoothed", "packed"])
def test_integer_products_stay_fused(name: str, exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path) -> None:
    kinds = Counter(node.op_type for node in _optimized(exported[name][1], tmp_path).graph.node)
    assert kinds["MatMulIntegerToFloat"] == LAYERS
    assert fuse_openvino(exported[name][1]).int8_products == count_int8_products(onnx.load(exported[name][1]).graph)


def test_storage_does_not_change_the_count_of_operations(exported: dict[str, tuple[nn.Module, Path]]) -> None:
    stored, plain = (operations_by_kind(exported[name][1], tokens=9.0) for name in ("packed", "smoothed"))
    assert stored == plain
    assert stored["int8"] > 0


def test_weights_in_steps_are_four_bits_in_the_file_and_int8_when_loaded(
    exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    path = exported["packed"][1]
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert sum(tensor.data_type == onnx.TensorProto.INT4 for tensor in stored.values()) == LAYERS + TABLES
    assert not any(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2 for tensor in stored.values())
    loaded = [tensor for tensor in _optimized(path, tmp_path).graph.initializer if len(tensor.dims) == 2]
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in loaded) == LAYERS + TABLES
    half = path.stat().st_size / exported["smoothed"][1].stat().st_size
    assert half < 0.75  # at this size names and shapes weigh much


def test_weights_in_groups_need_an_operator_set_that_has_them(
    exported: dict[str, tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="export.opset: weights in groups need 21 or higher, got 20"):
        export_onnx(exported["int4"][0], tmp_path / "model.onnx", NAMES, "logits", 20)


def _optimized(path: Path, folder: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")

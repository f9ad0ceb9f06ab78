"""PyTorch as a runtime of the exported file: it answers what ONNX Runtime answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from stages.core.errors import UserError
from stages.core.onnx_graph import export_onnx
from stages.core.quantized import (
    ActivationRange,
    GroupedLinear,
    HalfEmbedding,
    HalfLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    replace_module,
)
from stages.core.runtimes import ExportedModel, open_runtime, precisions, predict
from stages.core.torch_graph import torch_module

NAMES = ["input_ids", "attention_mask"]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
TEXTS = ["the cat", "", "how many ? how many ? how many", "paris " * 200, "dog"]


def grouped(linear: Any, bits: int) -> GroupedLinear:
    levels = torch.randint(0, 2**bits, (linear.in_features, linear.out_features), dtype=torch.uint8)
    zero_point = torch.randint(0, 2**bits, (linear.in_features // 16, linear.out_features), dtype=torch.uint8)
    return GroupedLinear.from_levels(linear, levels, zero_point, torch.rand(zero_point.shape) / 100, bits)


def quantized_model() -> nn.Module:
    """A layer in which every kind of quantized part occurs."""
    torch.manual_seed(3)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    covering = ActivationRange.covering(-4.0, 4.0)
    layer = "bert.encoder.layer.0"
    made = {
        "attention.self.query": lambda part: QuantizedLinear.from_linear(part, covering),
        "attention.self.key": lambda part: QuantizedLinear.from_linear(part, covering, torch.full((32,), 0.5)),
        "attention.self.value": lambda part: QuantizedLinear.from_linear(part, None),
        "attention.output.dense": lambda part: grouped(part, 4),
        "intermediate.dense": lambda part: grouped(part, 8),
        "output.dense": lambda part: HalfLinear.from_linear(part, "bf16"),
    }
    for name, make in made.items():
        replace_module(model, f"{layer}.{name}", make(model.get_submodule(f"{layer}.{name}")))
    tables: Any = model.get_submodule("bert.embeddings")
    tables.word_embeddings = QuantizedEmbedding.from_embedding(tables.word_embeddings)
    tables.position_embeddings = HalfEmbedding.from_embedding(tables.position_embeddings, "fp16")
    return model.eval()


def roberta() -> nn.Module:
    torch.manual_seed(3)
    return RobertaForSequenceClassification(RobertaConfig(**SIZES)).eval()


def batches() -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Of several shapes, one text alone among them."""
    generator, made = numpy.random.default_rng(0), []
    for texts, length in ((3, 9), (1, 5), (4, 2)):
        mask = (numpy.arange(length) < generator.integers(1, length + 1, (texts, 1))).astype(numpy.int64)
        made.append((numpy.where(mask == 1, generator.integers(2, 50, (texts, length)), 1), mask))
    return made


@pytest.mark.parametrize("build", [roberta, quantized_model])
def test_a_translated_graph_computes_what_onnx_runtime_does(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = export_onnx(build(), path, NAMES, "logits", 21)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    module = torch_module(proto, NAMES, torch.float32)
    for ids, mask in batches():
        wanted = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        with torch.inference_mode():
            got = module(torch.from_numpy(ids), torch.from_numpy(mask))
        assert got.dtype == torch.float32
        assert numpy.abs(got.numpy() - wanted).max() < 1e-4


def test_an_operator_that_is_not_known_is_named() -> None:
    node = helper.make_node("Erf", ["input_ids"], ["logits"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("input_ids", TensorProto.FLOAT, [1])], [value("logits", TensorProto.FLOAT, [1])]
    )
    with pytest.raises(UserError, match="PyTorch has no counterpart here for Erf"):
        torch_module(helper.make_model(graph), ["input_ids"], torch.float32)


def test_the_runtime_answers_like_the_others_and_gives_threads_back(exported_unit: Path) -> None:
    model = ExportedModel.load(exported_unit)
    expected = predict(model, open_runtime("onnxruntime-cpu", model), TEXTS, 2)[1]
    before = torch.get_num_threads()
    for precision in precisions("torch-eager"):
        runtime = open_runtime("torch-eager", model, threads=before + 1, precision=precision)
        assert (runtime.name, runtime.precision) == ("torch-eager", precision)
        got = predict(model, runtime, TEXTS, 2)[1]
        assert numpy.abs(got - expected).max() < (1e-5 if precision == "f32" else 0.05)
    assert torch.get_num_threads() == before


def test_compiling_meets_no_break_and_no_new_shape(exported_unit: Path) -> None:
    """With a backend that only records: PyTorch's own takes half a minute and a compiler."""
    model, graphs = ExportedModel.load(exported_unit), []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    module = torch_module(onnx.load(model.onnx_path), model.inputs, torch.float32)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend=backend)  # type: ignore[arg-type]
    with torch.inference_mode():
        for texts, length in ((2, 7), (3, 9), (5, 4)):
            ids = torch.ones(texts, length, dtype=torch.int64)
            torch.testing.assert_close(compiled(ids, ids), module(ids, ids))
    assert len(graphs) == 1

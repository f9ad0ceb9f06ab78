from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stages.core.lean import LeanClassifier, fits, scale_into
from stages.core.onnx_graph import LogitsOnly, export_onnx
from stages.core.quantized import ActivationRange, HalfEmbedding, QuantizedEmbedding, QuantizedLinear, replace_module
from stages.core.structure import encoder_layers, keep_parts

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
FAMILIES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=16, **SIZES)),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES[family]().eval()


def batch() -> tuple[Tensor, Tensor]:
    """Three texts of 9, 4 and 2 tokens, padded with token 1."""
    ids = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) < torch.tensor([9, 4, 2])[:, None]).long()
    return torch.where(mask == 1, ids, 1), mask


def difference(model: nn.Module) -> float:
    with torch.inference_mode():
        return float((LeanClassifier(model)(*batch()) - LogitsOnly(model)(*batch())).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lean_form_gives_the_same_logits(family: str) -> None:
    model = build(family)
    assert fits(model)
    assert difference(model) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_any_width_even_none_give_the_same_logits(family: str) -> None:
    model = build(family)
    first, second = encoder_layers(model)
    keep_parts(first, torch.tensor([], dtype=torch.long), torch.arange(7))
    keep_parts(second, torch.tensor([0, 2, 3]), torch.tensor([], dtype=torch.long))
    assert fits(model)
    assert difference(model) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [QuantizedEmbedding, HalfEmbedding])
def test_tables_of_fewer_bits_give_the_same_logits(family: str, kind: Any) -> None:
    model = build(family)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            small = kind.from_embedding(module, "bf16") if kind is HalfEmbedding else kind.from_embedding(module)
            replace_module(model, name, small)
    assert fits(model)
    assert difference(model) < 1e-5


def test_int8_layers_give_the_same_logits() -> None:
    model = build("bert")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "encoder" in name:
            replace_module(model, name, QuantizedLinear.from_linear(module, ActivationRange.covering(-4.0, 4.0)))
    # The scale in the query's weights rounds otherwise in float32, which may move a later input by one step.
    assert difference(model) < 0.05


def test_a_layer_of_another_kind_keeps_its_scale_outside() -> None:
    class Doubled(nn.Linear):
        pass

    layer = Doubled(3, 3)
    assert scale_into(layer, 0.5) == (layer, 0.5)
    inputs, plain = torch.randn(2, 3), nn.Linear(3, 4)
    scaled, left = scale_into(plain, 0.5)
    assert left == 1.0
    torch.testing.assert_close(scaled(inputs), plain(inputs) * 0.5)


def test_models_with_unknown_parts_keep_the_form_of_transformers(tmp_path: Path) -> None:
    model: Any = build("bert")
    model.bert.encoder.layer[0].rotation = nn.Linear(32, 32)
    assert not fits(model)
    other = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=1, hidden_dim=16)
    )
    assert not fits(other.eval())
    proto = export_onnx(other, tmp_path / "model.onnx", ["input_ids", "attention_mask"], "logits", 20)
    assert [value.name for value in proto.graph.output] == ["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_carries_no_more_than_the_model_needs(family: str, tmp_path: Path) -> None:
    proto = export_onnx(build(family), tmp_path / "model.onnx", ["input_ids", "attention_mask"], "logits", 20)
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"Where", "IsNaN", "GatherND", "Expand", "Range"}
    assert len(proto.graph.node) <= {"bert": 76, "roberta": 86, "electra": 81}[family]
    assert str(Path(__file__).parents[3]) not in str(proto)
    onnx.checker.check_model(proto, full_check=True)

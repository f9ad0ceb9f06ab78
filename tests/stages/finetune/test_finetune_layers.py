"""Layers of every family: learning rates, fresh weights, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from stages.core.errors import UserError
from stages.finetune.layers import layer_stacks, learning_rate_shares, reinitialize, set_dropout

SMALL: dict[str, Any] = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 16}
SMALL_BART = {
    "vocab_size": 30, "d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 20,
}  # fmt: skip
SMALL_T5 = {
    "vocab_size": 30,
    "d_model": 8,
    "d_kv": 4,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "d_ff": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT,
    "electra": {**BERT, "embedding_size": 8},
    "distilbert": {"vocab_size": 30, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16},
    "albert": {**BERT, "embedding_size": 4, "num_hidden_groups": 1},
    "modernbert": {**BERT, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 1},
    "xlnet": {"vocab_size": 30, "d_model": 8, "n_layer": 3, "n_head": 2, "d_inner": 16},
    "gpt2": {"vocab_size": 30, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 20},
    "llama": {**BERT, "num_key_value_heads": 2},
    "t5": SMALL_T5,
    "bart": SMALL_BART,
}  # fmt: skip
DEPTHS = {"albert": 1}
TWO_DECODER_LAYERS = {"bart": {"decoder_layers": 2}, "t5": {"num_decoder_layers": 2}}
IDS = torch.tensor([[2, 5, 6, 7, 1]])


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, num_labels=3, **{**CONFIGS[family], **changes})
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layer_learns_slower_than_the_one_above(family: str) -> None:
    model, depth = build(family), DEPTHS.get(family, 3)
    names = [name for name, _ in model.named_parameters()]
    shares = learning_rate_shares(names, decay=0.5)
    assert sum(layer_stacks(names).values()) == depth
    assert set(shares) == set(names)
    word_embeddings = model.get_input_embeddings().weight
    table = next(name for name, parameter in model.named_parameters() if parameter is word_embeddings)
    assert shares[table] == 0.5 ** (depth + 1)
    head = [share for name, share in shares.items() if name.startswith(("classif", "score", "logits_proj", "pre_"))]
    assert head
    assert set(head) == {1.0}
    assert set(shares.values()) == {0.5**power for power in range(depth + 2)}
    assert set(learning_rate_shares(names, decay=1.0).values()) == {1.0}


def test_shares_by_hand_with_a_decoder_above_its_encoder() -> None:
    shares = learning_rate_shares([name for name, _ in build("bart").named_parameters()], decay=0.5)
    assert shares["model.shared.weight"] == 0.5**4
    assert shares["model.encoder.layers.0.fc1.weight"] == 0.5**3
    assert shares["model.encoder.layers.1.fc1.weight"] == 0.5**2
    assert shares["model.decoder.layers.0.fc1.weight"] == 0.5
    assert shares["classification_head.dense.weight"] == 1.0
    names = ["bert.embeddings.LayerNorm.weight", "bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias"]
    assert list(learning_rate_shares(names, 0.9).values()) == pytest.approx([0.9**3, 0.9, 1.0])


def _changed(before: dict[str, Tensor], model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in DEPTHS])
def test_fresh_weights_are_those_of_the_top_and_nothing_below(family: str, tmp_path: Any) -> None:
    model = build(family, **TWO_DECODER_LAYERS.get(family, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    reinitialize(loaded, 1)
    changed = _changed(before, loaded)
    stack, layers = list(layer_stacks(before).items())[-1]
    assert changed
    assert all(name.startswith(f"{stack}.{layers - 1}.") or "pooler" in name for name in changed)
    matrices = [tensor for name, tensor in loaded.state_dict().items() if name in changed and tensor.ndim > 1]
    assert all(tensor.std() > 0.0 for tensor in matrices)


def test_fresh_weights_of_bert_are_drawn_as_bert_draws_them() -> None:
    model = build("bert", hidden_size=64, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    reinitialize(model, 1)
    layer = model.bert.encoder.layer[1]
    assert layer.attention.self.query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.attention.self.query.bias.abs().sum() == 0.0
    assert torch.equal(layer.output.LayerNorm.weight, torch.ones(64))
    assert model.bert.pooler.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.bert.encoder.layer[0].output.dense.weight == 7.0).all()
    assert (model.classifier.weight == 7.0).all()


@pytest.mark.parametrize(("family", "count"), [("bert", 3), ("albert", 1), ("bart", 1)])
def test_a_layer_with_weights_of_its_own_must_stay(family: str, count: int) -> None:
    with pytest.raises(UserError, match="finetune.reinitialized_layers"):
        reinitialize(build(family), count)


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in ("llama", "t5")])
def test_without_dropout_training_answers_as_evaluation_does(family: str) -> None:
    model = build(family).train()
    set_dropout(model, 0.5)
    assert not torch.allclose(model(IDS).logits, model(IDS).logits)
    set_dropout(model, 0.0)
    torch.testing.assert_close(model(IDS).logits, model.eval()(IDS).logits)


def test_dropout_is_left_alone_or_must_be_there() -> None:
    model = build("bert", hidden_dropout_prob=0.3)
    set_dropout(model, None)
    assert model.bert.embeddings.dropout.p == 0.3
    set_dropout(model, 0.2)
    assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {0.2}
    assert model.config.hidden_dropout_prob == 0.3
    with pytest.raises(UserError, match="has no dropout"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)

"""Few trained parameters: what moves, what is merged, and that whatever leaves the stage is a whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from finetune_parts import (
    ADALORA,
    ADDED,
    ALL,
    HEAD,
    KINDS,
    LAYERS,
    LORA,
    MERGED,
    NEURONS,
    STEPS,
    TINY,
    Stage,
    batch,
    logits,
    params_of,
    trained,
)
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from stages.core.added import describe_added
from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.lean import LeanClassifier, fits
from stages.core.onnx_graph import LogitsOnly, export_onnx
from stages.core.params import parse_params
from stages.core.sliced import check_sliceable
from stages.core.structure import encoder_layers, keep_parts, quantizable_linears
from stages.finetune.efficient import count_trained, head_parts, make_efficient, target_names
from stages.quantize.recipes import quantize_model
from stages.quantize.smooth import find_sites


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_parameters_are_trained_and_no_others_move(kind: str, tiny_checkpoint: Path) -> None:
    before: Any = load_model(tiny_checkpoint)
    counted = copy.deepcopy(before)
    make_efficient(counted, params_of(KINDS[kind]), STEPS)
    assert count_trained(counted) == ADDED[kind] + HEAD
    model, _ = trained(kind, tiny_checkpoint)
    head = {id(parameter) for part in head_parts(model) for parameter in part.parameters()}
    state = before.state_dict()
    kept = {
        name.replace(".base_layer", "").replace(".dropout.dropout", ".dropout"): parameter
        for name, parameter in model.named_parameters()
    }
    assert set(state) <= set(kept)
    moved = {name for name in state if not torch.equal(kept[name], state[name])}
    assert moved == {name for name in state if id(kept[name]) in head}
    assert {name.split(".")[0] if "pooler" not in name else "pooler" for name in moved} == {"pooler", "classifier"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_computes_the_same(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Finished, saved and loaded, in the lean form and in ONNX."""
    model, tuning = trained(kind, tiny_checkpoint)
    wanted = logits(model)
    assert (wanted - logits(load_model(tiny_checkpoint))).abs().max() > 0.1
    tuning.finish()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0.0)
    plain = set(load_model(tiny_checkpoint).state_dict())
    assert (set(model.state_dict()) == plain) == (kind in MERGED)
    assert describe_added(model) == (None if kind in MERGED else KINDS[kind])
    folder = tmp_path / "saved"
    folder.mkdir()
    save_model(model, folder, tiny_checkpoint, [])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    loaded = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert fits(loaded)
    ids, mask = batch().values()
    with torch.inference_mode():
        torch.testing.assert_close(LeanClassifier(loaded)(ids, mask), wanted, atol=1e-5, rtol=0.0)
    if kind in ("adalora", "ia3"):
        return  # as lora: an ordinary checkpoint, whose export other tests hold
    export_onnx(loaded, tmp_path / "model.onnx", ["input_ids", "attention_mask"], "logits", opset=21)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch().items()})
    numpy.testing.assert_allclose(given, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_pretrained_answers(kind: str, tiny_checkpoint: Path) -> None:
    """A prefix adds keys to attend to; every other kind changes nothing before its first step."""
    model = load_model(tiny_checkpoint)
    before = logits(model)
    make_efficient(model, params_of(KINDS[kind]), STEPS)
    assert torch.allclose(logits(model), before, atol=1e-6) == (kind != "prefix")


def test_a_prefix_of_no_weight_is_no_prefix(tiny_checkpoint: Path) -> None:
    """Keys far from every query are not attended to; padding is not either, whatever the implementation."""
    model: Any = load_model(tiny_checkpoint)
    before = logits(model)
    make_efficient(model, params_of(KINDS["prefix"]), STEPS)
    alone = model.eval()(input_ids=batch()["input_ids"][1:2, :5]).logits
    torch.testing.assert_close(logits(model)[1:2], alone, atol=1e-5, rtol=0.0)
    fused = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), fused, atol=1e-5, rtol=0.0)
    for layer in encoder_layers(model):
        attention: Any = layer.attention.self  # type: ignore[union-attr]
        attention.query.weight.data.zero_()
        attention.query.bias.data.fill_(1.0)
        attention.prefix_keys.data.fill_(-1e4)
    without: Any = load_model(tiny_checkpoint)
    for layer in encoder_layers(without):
        layer.attention.self.query.weight.data.zero_()  # type: ignore[union-attr]
        layer.attention.self.query.bias.data.fill_(1.0)  # type: ignore[union-attr]
    torch.testing.assert_close(logits(model), logits(without), atol=1e-5, rtol=0.0)
    assert not torch.allclose(logits(without), before)


@pytest.mark.parametrize("kind", ["adapters", "prefix"])
def test_a_model_with_added_parts_is_pruned_like_any(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Heads that the output projection ignores, and all of a layer's, go without a change of the answers."""
    model, _ = trained(kind, tiny_checkpoint)
    layers: list[Any] = list(encoder_layers(model))
    layers[0].attention.output.dense.weight.data[:, 8:16] = 0.0
    layers[1].attention.output.dense.weight.data.zero_()
    wanted = logits(model)
    keep_parts(layers[0], torch.tensor([0, 2, 3]), torch.arange(NEURONS))
    keep_parts(layers[1], torch.arange(0), torch.arange(NEURONS))
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0.0)
    save_model(model, tmp_path, tiny_checkpoint, [])
    loaded = load_model(tmp_path)
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-5, rtol=0.0)
    ids, mask = batch().values()
    with torch.inference_mode():
        torch.testing.assert_close(LeanClassifier(loaded)(ids, mask), LogitsOnly(loaded)(ids, mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["adapters", "prefix"])
def test_a_model_with_added_parts_is_quantized_like_any(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, _ = trained(kind, tiny_checkpoint)
    names = quantizable_linears(model)
    assert sum(".dropout." in name for name in names) == (LAYERS * 4 if kind == "adapters" else 0)
    # The division by channel may not move into a value projection beside which a prefix has values of its own.
    assert any(site.writer for site in find_sites(model, names)) == (kind == "adapters")
    wanted = logits(model)
    quantized = quantize_model(model, dict.fromkeys(names))
    torch.testing.assert_close(logits(quantized), wanted, atol=0.2, rtol=0.0)
    save_model(quantized, tmp_path, tiny_checkpoint, [])
    assert torch.equal(logits(load_model(tmp_path)), logits(quantized))


def test_adapters_are_not_sliced(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    make_efficient(model, params_of(KINDS["adapters"]), STEPS)
    with pytest.raises(UserError, match=r"prune.hidden_slicing: the checkpoint has adapters .*set it to null"):
        check_sliceable(model)


def test_adalora_ends_with_its_budget_of_ranks(tiny_checkpoint: Path) -> None:
    model, _ = trained("adalora", tiny_checkpoint)
    ranks = [int((part != 0).sum()) for name, part in model.named_parameters() if ".lora_E." in name]
    assert sum(ranks) == ADALORA["rank"] * LAYERS * len(ALL)
    assert len(set(ranks)) > 1


def test_targets_are_found_by_structure_or_name(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    assert len(target_names(model, "attention")) == LAYERS * 4
    assert len(target_names(model, "feed_forward")) == LAYERS * 2
    named = target_names(model, ["query", "value"])
    assert named == [
        f"bert.encoder.layer.{layer}.attention.self.{part}" for layer in (0, 1) for part in ("query", "value")
    ]
    assert not any("pooler" in name or "classifier" in name for name in target_names(model, ["dense"]))
    with pytest.raises(
        UserError, match=r"targets: no linear layer's name ends in 'qury'; they end in dense, key, query, value"
    ):
        target_names(model, ["query", "qury"])


def test_a_family_that_is_not_known_takes_names() -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    model = DistilBertForSequenceClassification(config)
    with pytest.raises(UserError, match="the layers of model_type distilbert are not known here; take lora or adalora"):
        make_efficient(model, params_of(KINDS["lora"]), STEPS)
    make_efficient(model, params_of({**LORA, "targets": ["q_lin"]}), STEPS)
    assert count_trained(model) == 3 * 32 + (17 * 16) + (17 * 3)


def test_params_refuse_what_cannot_be() -> None:
    raw = copy.deepcopy(TINY)
    raw["finetune"] |= {"efficient": LORA, "adversarial": {"kind": "fgm", "epsilon": 1.0}}
    with pytest.raises(UserError, match="which efficient freezes; take freelb, or set one of the two to null"):
        parse_params(raw, "here")
    raw["finetune"] |= {"efficient": {**ADALORA, "rank": 4}, "adversarial": None}
    with pytest.raises(UserError, match="rank 4 must be smaller than start_rank 4"):
        parse_params(raw, "here")


@pytest.mark.parametrize("kind", ["lora", "adalora", "prefix"])
def test_an_interrupted_training_ends_with_the_same_bits(kind: str, finetune: Stage) -> None:
    _, whole = finetune("whole", efficient=KINDS[kind])
    with pytest.raises(KeyboardInterrupt):
        finetune("broken", interrupt_at=9, efficient=KINDS[kind])
    metrics, resumed = finetune("broken", efficient=KINDS[kind])
    assert (resumed.staging / "model/model.safetensors").read_bytes() == (
        whole.staging / "model/model.safetensors"
    ).read_bytes()
    assert metrics["trained_parameters"] == ADDED[kind] + HEAD
    assert resumed.history == whole.history


def test_too_few_steps_for_falling_ranks(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="ranks cannot fall over 1 steps; train for more epochs"):
        make_efficient(load_model(tiny_checkpoint), params_of({**ADALORA, "warmup": 0.6}), 1)

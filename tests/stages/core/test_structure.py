from pathlib import Path

import onnxruntime
import pytest
import torch

from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.onnx_graph import export_onnx
from stages.core.structure import (
    LayerWidth,
    attention_output,
    encoder_layers,
    keep_layers,
    keep_parts,
    layer_widths,
    neuron_output,
    set_widths,
)


@pytest.fixture
def model(tiny_checkpoint: Path) -> torch.nn.Module:
    return load_model(tiny_checkpoint)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17).reshape(2, 6)).logits


def test_widths_are_read(model: torch.nn.Module) -> None:
    assert layer_widths(model) == [LayerWidth(heads=4, neurons=64)] * 2


def test_removed_parts_compute_the_same_as_masked_ones(model: torch.nn.Module, tiny_checkpoint: Path) -> None:
    heads, neurons = torch.tensor([0, 2]), torch.tensor([1, 5, 63])
    masked = load_model(tiny_checkpoint)
    for layer in encoder_layers(masked):
        weight = attention_output(layer).weight.data.view(32, 4, 8)
        weight[:, [1, 3]] = 0.0
        kept = neuron_output(layer).weight.data[:, neurons].clone()
        neuron_output(layer).weight.data.zero_()
        neuron_output(layer).weight.data[:, neurons] = kept
    for layer in encoder_layers(model):
        keep_parts(layer, heads, neurons)
    assert layer_widths(model) == [LayerWidth(2, 3)] * 2
    torch.testing.assert_close(_logits(model), _logits(masked), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("heads", "neurons"), [([], [1, 5, 63]), ([0, 2], []), ([], [])])
def test_a_block_without_parts_computes_the_same_as_a_masked_one(
    heads: list[int], neurons: list[int], model: torch.nn.Module, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    masked = load_model(tiny_checkpoint)
    gone = encoder_layers(masked)[0]
    for head in set(range(4)) - set(heads):
        attention_output(gone).weight.data.view(32, 4, 8)[:, head] = 0.0
    neuron_output(gone).weight.data[:, [index for index in range(64) if index not in neurons]] = 0.0
    keep_parts(encoder_layers(model)[0], torch.tensor(heads).long(), torch.tensor(neurons).long())
    assert layer_widths(model) == [LayerWidth(len(heads), len(neurons)), LayerWidth(4, 64)]
    torch.testing.assert_close(_logits(model), _logits(masked), atol=1e-5, rtol=0)

    save_model(model, tmp_path, tiny_checkpoint, [])
    again = load_model(tmp_path)
    assert layer_widths(again) == layer_widths(model)
    torch.testing.assert_close(_logits(again), _logits(model), atol=0, rtol=0)
    keep_parts(encoder_layers(again)[0], torch.tensor(heads[:1]).long(), torch.tensor([]).long())
    assert layer_widths(again)[0] == LayerWidth(len(heads[:1]), 0)


def test_a_layer_without_parts_vanishes_from_the_graph(model: torch.nn.Module, tmp_path: Path) -> None:
    nothing = torch.tensor([]).long()
    keep_parts(encoder_layers(model)[0], nothing, nothing)
    graph = export_onnx(model, tmp_path / "model.onnx", ["input_ids", "attention_mask"], "logits", opset=20).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Softmax") == operators.count("Gelu") == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.arange(5, 17).reshape(2, 6)
    given = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), _logits(model), atol=1e-4, rtol=0)


def test_keeping_every_part_changes_nothing(model: torch.nn.Module) -> None:
    before = _logits(model)
    for layer in encoder_layers(model):
        keep_parts(layer, torch.arange(4), torch.arange(64))
    torch.testing.assert_close(_logits(model), before, atol=0, rtol=0)


def test_layers_are_dropped(model: torch.nn.Module) -> None:
    last = encoder_layers(model)[1]
    keep_layers(model, [1])
    assert list(encoder_layers(model)) == [last]
    assert model.config.num_hidden_layers == 1
    assert _logits(model).shape == (2, 3)


def test_a_layer_that_is_not_there_is_named(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match=r"distill.student.layers: the teacher has layers 0 to 1, got \[0, 2\]"):
        keep_layers(model, [0, 2])


def test_widths_of_another_depth_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="widths for 1 layers"):
        set_widths(model, [LayerWidth(1, 1)])


def test_an_unknown_family_is_named(model: torch.nn.Module) -> None:
    model.config.model_type = "mystery"
    with pytest.raises(UserError, match="model_type mystery: compression knows bert"):
        encoder_layers(model)

import json
from pathlib import Path

import pytest
import torch

from stages.core.artifacts import digest
from stages.core.checkpoints import count_parameters, extend_lineage, load_model, logits_of, save_model
from stages.core.errors import UserError
from stages.core.quantized import ActivationRange, QuantizedLinear, replace_module
from stages.core.structure import LayerWidth, encoder_layers, keep_parts, layer_widths

BATCH = {"input_ids": torch.arange(5, 17).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}


def _saved(model: torch.nn.Module, folder: Path, tokenizer: Path) -> Path:
    folder.mkdir()
    save_model(model, folder, tokenizer, [])
    return folder


def test_irregular_widths_survive(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    first, second = encoder_layers(model)
    keep_parts(first, torch.tensor([1]), torch.arange(0, 64, 2))
    keep_parts(second, torch.tensor([0, 2, 3]), torch.arange(7))
    loaded = load_model(_saved(model, tmp_path / "pruned", tiny_checkpoint))
    assert layer_widths(loaded) == [LayerWidth(1, 32), LayerWidth(3, 7)]
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


@pytest.mark.parametrize("activations", [ActivationRange.covering(-1.5, 2.25), None])
def test_quantized_layers_survive(activations: ActivationRange | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    name = "bert.encoder.layer.0.intermediate.dense"
    replace_module(model, name, QuantizedLinear.from_linear(model.get_submodule(name), activations))
    loaded = load_model(_saved(model, tmp_path / "int8", tiny_checkpoint))
    assert isinstance(loaded.get_submodule(name), QuantizedLinear)
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    assert count_parameters(loaded) == count_parameters(load_model(tiny_checkpoint))


def test_the_same_model_is_written_in_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    one, other = (_saved(model, tmp_path / name, tiny_checkpoint) for name in ("one", "other"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_no_pickle_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = _saved(load_model(tiny_checkpoint), tmp_path / "model", tiny_checkpoint)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_weights_that_do_not_fit_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = _saved(load_model(tiny_checkpoint), tmp_path / "model", tiny_checkpoint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 11}))
    with pytest.raises(UserError, match="the weights do not fit config.json"):
        load_model(folder)


def test_truncated_weights_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = _saved(load_model(tiny_checkpoint), tmp_path / "model", tiny_checkpoint)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load_model(folder)


def test_lineage_grows_by_the_stage_and_its_parent(tiny_checkpoint: Path) -> None:
    lineage = extend_lineage(tiny_checkpoint, "prune")
    assert lineage == [{"stage": "finetune"}, {"stage": "prune", "parent": digest(tiny_checkpoint)}]

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from stages.acquire.checkpoint import copy_checkpoint, safetensors_shapes, scratch_checkpoint, vocabulary_size
from stages.core.errors import UserError
from stages.core.params import ScratchSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in miniature: 6 embedded tokens, a tokenizer of 5."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 6}), encoding="utf-8")
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(6, 2)}, folder / "model.safetensors")
    write_tokenizer(folder, 5)
    (folder / "README.md").write_text("about", encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, tokens: int) -> None:
    vocabulary = {"[UNK]": 0, **{f"word{n}": n for n in range(1, tokens)}}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


def copied(folder: Path) -> list[str]:
    target = folder.parent / "copy"
    target.mkdir()
    return copy_checkpoint(folder.iterdir(), target, "acquire.checkpoint: own")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        copied(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_copied_without_what_it_does_not_need(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"a pickle")
    assert copied(folder) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has only pickled weights (pytorch_model.bin)" in refusal(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors)" in refusal(folder)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "model-2.safetensors is missing" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors is damaged or cut short" in refusal(folder)


def test_a_larger_tokenizer_is_refused(folder: Path) -> None:
    write_tokenizer(folder, 7)
    assert "its tokenizer has 7 tokens and its weights only 6" in refusal(folder)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer.json cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "config.json is not valid JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "bert", "vocab_size": 9}', "says vocab_size 9, but the weights embed 6"),
    ],
)
def test_a_wrong_config_is_refused(folder: Path, config: str, said: str) -> None:
    (folder / "config.json").write_text(config, encoding="utf-8")
    assert said in refusal(folder)


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_shapes_are_read_from_the_header(folder: Path) -> None:
    shapes = safetensors_shapes(folder / "model.safetensors", "own")
    assert shapes == {"bert.embeddings.word_embeddings.weight": [6, 2]}


def test_vocabularies_in_other_files_count(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 7}', encoding="utf-8")
    assert vocabulary_size(tmp_path, "own") == 8
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n\x85\n", encoding="utf-8")
    assert vocabulary_size(tmp_path, "own") == 3


def test_scratch_writes_the_configuration_alone(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4}
    scratch_checkpoint(ScratchSource(kind="scratch", config=config), tmp_path, "acquire.checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 64}, "names no model_type"),
        ({"model_type": "brt"}, "Unrecognized model identifier: brt"),
        ({"model_type": "bert", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "bert", "hidden_size": 65, "num_attention_heads": 4}, "65 is not a multiple of"),
    ],
)
def test_impossible_configurations_are_refused(tmp_path: Path, config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        scratch_checkpoint(ScratchSource(kind="scratch", config=config), tmp_path, "acquire.checkpoint")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

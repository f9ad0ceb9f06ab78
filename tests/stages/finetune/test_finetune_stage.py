"""The whole stage on a tiny checkpoint: every method changes training, and no interruption changes its result."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from stages.core.artifacts import write_json, write_manifest
from stages.core.checkpoints import load_tokenizer
from stages.core.errors import UserError
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.training import loop
from stages.finetune.__main__ import run_finetune

TINY = yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text())
PLAIN: dict[str, Any] = {"epochs": 1, "label_smoothing": 0.0, "adversarial": None}
EDITS = {"copies": 1, "synonyms": 0.2, "insertions": 0.2, "swaps": 0.2, "deletions": 0.2}
GUESSES = {"copies": 1, "mask_probability": 0.3, "candidates": 5}
METHODS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.3},
    "label_smoothing": {"label_smoothing": 0.1},
    "focal": {"focal_gamma": 2.0},
    "effective_number": {"class_weights": {"kind": "effective_number", "beta": 0.99}},
    "r_drop": {"r_drop": 1.0},
    "layer_decay": {"layer_decay": 0.8},
    "fresh_layer": {"reinitialized_layers": 1},
    "fgm": {"adversarial": {"kind": "fgm", "epsilon": 1.0}},
    "freelb": {"adversarial": {"kind": "freelb", "steps": 2, "step_size": 0.1, "epsilon": 0.6}},
    "mixup": {"mixup": 0.4},
    "edits": {"augmentation": {"edits": EDITS, "guesses": None}},
    "guesses": {"augmentation": {"edits": None, "guesses": GUESSES}},
    "many": {"r_drop": 1.0, "mixup": 0.4, "adversarial": {"kind": "fgm", "epsilon": 1.0}, "focal_gamma": 1.0},
    "freelb_r_drop": {"r_drop": 1.0, "adversarial": {"kind": "freelb", "steps": 2, "step_size": 0.1, "epsilon": 0.6}},
}


class Silent:
    """A run record that keeps nothing."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass


Finetune = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def inputs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained language model, the data of which one class is rare, and a lexicon."""
    import pandas
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("inputs")
    config = BertConfig(
        vocab_size=len(load_tokenizer(tiny_data / "tokenizer")), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(3)
    BertForMaskedLM(config).save_pretrained(folder / "model")
    write_manifest(folder / "model")
    data = folder / "data"
    data.mkdir()
    for path in tiny_data.iterdir():
        (data / path.name).symlink_to(path)
    train = pandas.read_parquet(data / "train.parquet")
    (data / "train.parquet").unlink()
    train[(train["label"] != 0) | (train.index < 20)].to_parquet(data / "train.parquet")
    (folder / "lexicon").mkdir()
    write_json(folder / "lexicon" / "synonyms.json", {"town": ["hill", "river"], "cat": ["dog"], "many": ["few"]})
    return {"model": folder / "model", "data": data, "lexicon": folder / "lexicon"}


@pytest.fixture(scope="module")
def finetune(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finetune:
    """Fine-tune with some params changed; the same name goes on from what is saved under it."""
    states = tmp_path_factory.mktemp("states")

    def run(name: str, without: str = "", **changes: Any) -> dict[str, torch.Tensor]:
        raw = copy.deepcopy(TINY)
        raw["finetune"] |= {**PLAIN, **changes}
        raw["finetune"]["optimizer"] |= {"batch_tokens": 160, "precision": "fp32"}
        torch.manual_seed(raw["seed"])
        given = {role: path for role, path in inputs.items() if role != without}
        staging = tmp_path_factory.mktemp("staging")
        run_finetune(StageRun("finetune", parse_params(raw, "here"), given, staging, states / name, Silent()))  # type: ignore[arg-type]
        return safetensors.torch.load_file(staging / "model" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def plain(finetune: Finetune) -> dict[str, torch.Tensor]:
    return finetune("plain")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_training_and_an_interruption_does_not(
    method: str, finetune: Finetune, plain: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(f"{method}-whole", **METHODS[method])
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert not _same(whole, plain)
    step = loop.Trainer._step

    def interrupted(self: loop.Trainer, tensors: Any, batch: Any) -> None:
        step(self, tensors, batch)
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(f"{method}-broken", **METHODS[method])
    assert _same(finetune(f"{method}-broken", **METHODS[method]), whole)


def test_methods_turned_off_change_no_bit(finetune: Finetune, plain: dict[str, torch.Tensor]) -> None:
    alike = {"class_weights": {"kind": "effective_number", "beta": 1e-9}, "focal_gamma": 0.0, "layer_decay": 1.0}
    for name, tensor in finetune("alike", **alike).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)
    assert _same(finetune("again"), plain)


def test_edits_without_a_lexicon_are_refused_unless_they_need_none(finetune: Finetune) -> None:
    with pytest.raises(UserError, match="--lexicon"):
        finetune("edits", without="lexicon", augmentation={"edits": EDITS, "guesses": None})
    shuffling = {**EDITS, "synonyms": 0.0, "insertions": 0.0}
    finetune("edits", without="lexicon", augmentation={"edits": shuffling, "guesses": None})

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
import safetensors.torch
import torch
import yaml

from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model, load_tokenizer
from stages.core.examples import load_examples
from stages.core.params import parse_params
from stages.core.stage import StageRun, _state_key
from stages.core.teacher import CACHE, Recorded, teacher_outputs
from stages.distill.__main__ import run_distill

TINY = yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text())
EVERY_TERM = {"soft": 1.0, "hard": 0.1, "hidden": 0.5, "attention": 0.0, "relations": 1.0}
NARROW = {"kind": "narrow", "layers": 2, "hidden": 16, "heads": 2, "neurons": 24}


class Silent:
    """A run record that keeps nothing."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass


@pytest.fixture
def inputs(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    from transformers import BertConfig, BertForMaskedLM

    monkeypatch.chdir(tmp_path)
    corpus, language_model = tmp_path / "corpus", tmp_path / "language-model"
    corpus.mkdir()
    pandas.DataFrame({"text": [f"where is the {word} ?" for word in ("town", "hill", "bird")]}).to_parquet(
        corpus / "corpus.parquet"
    )
    vocabulary = len(load_tokenizer(tiny_data / "tokenizer"))
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(3)
    BertForMaskedLM(config).save_pretrained(language_model)
    for folder in (corpus, language_model):
        write_manifest(folder)
    return {"teacher": tiny_checkpoint, "data": tiny_data, "corpus": corpus, "language_model": language_model}


def _raw(**distill: Any) -> dict[str, Any]:
    raw = copy.deepcopy(TINY)
    raw["distill"] |= {"epochs": 2, "weights": EVERY_TERM, "relations": {"layer": 1, "heads": 4}, **distill}
    raw["distill"]["student"] = distill.get("student", {"kind": "layers", "layers": [0, 1]})
    raw["distill"]["transfer"]["augmentation"]["copies"] = 1
    return raw


def _run(raw: dict[str, Any], inputs: dict[str, Path], name: str) -> tuple[dict[str, Any], Path]:
    torch.manual_seed(raw["seed"])
    staging = Path(name)
    run = StageRun("distill", parse_params(raw, "here"), inputs, staging, staging / "state", Silent())  # type: ignore[arg-type]
    return run_distill(run), staging / "model"


@pytest.mark.parametrize("student", [{"kind": "layers", "layers": [0, 1]}, NARROW], ids=["layers", "narrow"])
def test_a_student_learns_and_loads_again(student: dict[str, Any], inputs: dict[str, Path]) -> None:
    raw = _raw(student=student, epochs=4 if student["kind"] == "layers" else 40)
    raw["distill"]["optimizer"]["learning_rate"] = 5.0e-3
    metrics, model = _run(raw, inputs, "out")
    assert metrics["transfer_texts"] > 3 + 40
    assert metrics["validation"]["accuracy"] > 0.6
    weights = safetensors.torch.load_file(model / "model.safetensors")
    assert not any("projection" in name for name in weights)
    assert sum(tensor.numel() for tensor in weights.values()) >= metrics["parameters"]
    ids = torch.tensor([load_examples(inputs["data"], "test").input_ids[0]])
    assert load_model(model)(input_ids=ids).logits.shape == (1, 3)


def test_what_was_cached_never_changes_the_weights(inputs: dict[str, Path]) -> None:
    """From nothing, from everything, and from some texts asked before: the same student, bit for bit."""
    raw = _raw(student=NARROW)
    files = [_run(raw, inputs, "cold")[1], _run(raw, inputs, "warm")[1]]
    shutil.rmtree(CACHE)
    rows = load_examples(inputs["data"], "train").input_ids[::3]
    recorded = Recorded(hidden=(0, 1), relations=1)
    teacher_outputs(inputs["teacher"], rows, recorded, raw["distill"]["optimizer"]["precision"])
    files.append(_run(raw, inputs, "partly")[1])
    assert len({path.parent for path in CACHE.glob("*/*/outputs.safetensors")}) == 2
    assert len({(file / "model.safetensors").read_bytes() for file in files}) == 1


def test_resume_state_goes_stale_with_a_checkpoint_that_params_name(
    inputs: dict[str, Path], tiny_checkpoint: Path
) -> None:
    shutil.copytree(tiny_checkpoint, "second")
    params = parse_params(_raw(teachers=["second"]), "here")
    before = _state_key("distill", params, inputs)
    assert _state_key("distill", params, inputs) == before
    Path("second/note.txt").write_text("changed")
    assert _state_key("distill", params, inputs) != before

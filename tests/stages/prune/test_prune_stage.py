from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml

from stages.core.artifacts import write_manifest
from stages.core.checkpoints import count_parameters, load_model
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_pad_id
from stages.core.judging import validation_quality
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.structure import LayerWidth, hidden_width, is_sliced, layer_widths
from stages.core.tasks import get_task
from stages.prune.__main__ import run_prune

TINY = yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text(encoding="utf-8"))


class Silent:
    """A run record that keeps nothing."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass


@pytest.fixture
def stage(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the stage with changed params and returns its metrics and the folder of the model it saved."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pandas.DataFrame({"text": ["where is the town ?", "what is a bird"]}).to_parquet(corpus / "corpus.parquet")
    write_manifest(corpus)
    inputs = {"model": tiny_checkpoint, "teacher": tiny_checkpoint, "data": tiny_data, "corpus": corpus}

    def run(**changes: Any) -> tuple[dict[str, Any], Path]:
        raw = {**TINY, "prune": {**TINY["prune"], **changes}}
        raw["distill"] = {**TINY["distill"], "student": {"kind": "layers", "layers": [0, 1]}}
        params, staging = parse_params(raw, "tiny"), tmp_path / "staging"
        staging.mkdir()
        run = StageRun("prune", params, inputs, staging, tmp_path / "state", Silent())  # type: ignore[arg-type]
        metrics = run_prune(run)
        return metrics, staging / "model"

    return run


def test_a_student_loses_width_heads_and_tokens_and_recovers(stage: Any, tiny_data: Path) -> None:
    metrics, folder = stage(hidden_slicing={"share": 0.25, "multiple": 8})
    model, hidden = load_model(folder), metrics["hidden"]
    assert is_sliced(model)
    assert hidden["width"] == hidden_width(model) == 24
    assert hidden["of"] == 32
    assert hidden["speedup"] is None
    assert len(hidden["variance_kept"]) == 5
    assert all(0.5 < share < 1.0 for share in hidden["variance_kept"].values())
    # Per layer: 4 x 32 x 32 of attention and 2 x 64 x 32; then all of it on 24, and two residuals of 24 x 24.
    assert hidden["multiplications"]["before"] == 2 * (4 * 32 * 32 + 2 * 64 * 32)
    assert hidden["multiplications"]["after"] == 2 * (4 * 32 * 24 + 2 * 64 * 24 + 2 * 24 * 24)
    assert sum(width.heads for width in layer_widths(model)) == 6
    assert sum(width.neurons for width in layer_widths(model)) == 64
    assert metrics["parameters"] == count_parameters(model)
    validation = load_examples(tiny_data, "validation", folder)
    quality = validation_quality(model, get_task("text-classification"), validation, load_pad_id(tiny_data, folder))
    assert quality == metrics["validation"]


def test_slicing_alone_is_followed_by_recovery(stage: Any) -> None:
    metrics, folder = stage(
        hidden_slicing={"share": 0.5, "multiple": 8}, sparsity={"heads": 0.0, "neurons": 0.0}, vocabulary=None
    )
    model = load_model(folder)
    assert layer_widths(model) == [LayerWidth(4, 64)] * 2
    assert metrics["cuts"] == {}
    norm: Any = model.get_submodule("bert.embeddings.LayerNorm")
    assert norm.weight.std() > 0  # one number for all before training


def test_a_family_that_cannot_be_sliced_is_told_before_work_starts(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr("stages.prune.__main__.load_examples", refuse)
    monkeypatch.setattr("stages.prune.__main__.load_model", lambda _: _decoder())
    with pytest.raises(
        UserError, match="prune.hidden_slicing: BertForSequenceClassification is a decoder; set it to null"
    ):
        stage(hidden_slicing={"share": 0.25, "multiple": 8})


def _decoder() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=9,
            is_decoder=True,
        )
    )

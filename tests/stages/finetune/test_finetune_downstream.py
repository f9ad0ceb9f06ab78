"""What stays in a fine-tuned model is taken by the stages after it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas
import pytest
from finetune_parts import KINDS, TINY, Silent, trained

from stages.core.added import describe_added
from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model, save_model
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.structure import layer_widths
from stages.distill.__main__ import run_distill
from stages.prune.__main__ import run_prune
from stages.quantize.__main__ import run_quantize


@pytest.mark.parametrize("kind", ["adapters", "prefix"])
def test_it_is_distilled_pruned_and_quantized(
    kind: str, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus, teacher = tmp_path / "corpus", tmp_path / "teacher"
    corpus.mkdir()
    teacher.mkdir()
    pandas.DataFrame({"text": ["where is the town ?", "what is a bird"]}).to_parquet(corpus / "corpus.parquet")
    save_model(trained(kind, tiny_checkpoint)[0].eval(), teacher, tiny_checkpoint, [{"stage": "finetune"}])
    raw = copy.deepcopy(TINY)
    raw["distill"] |= {"epochs": 1, "student": {"kind": "layers", "layers": [0, 1]}}
    raw["prune"] |= {"sparsity": {"heads": 0.25, "neurons": 0.25}, "neuron_multiple": 8}
    raw["quantize"]["recipes"] = ["int8_static"]
    raw["quantize"]["gate"]["tolerated_loss"] = 1.0
    for folder in (corpus, teacher):
        write_manifest(folder)
    inputs = {"teacher": teacher, "data": tiny_data, "corpus": corpus, "language_model": tiny_checkpoint}
    stages: dict[str, Any] = {"distill": run_distill, "prune": run_prune, "quantize": run_quantize}
    for name, body in stages.items():
        staging = tmp_path / name
        staging.mkdir()
        run = StageRun(name, parse_params(raw, "tiny"), inputs, staging, tmp_path / f"state-{name}", Silent())  # type: ignore[arg-type]
        metrics = body(run)
        inputs = {**inputs, "model": staging / "model"}
        write_manifest(staging / "model")
    model = load_model(tmp_path / "quantize/model")
    assert metrics["recipe"] == "int8_static"
    assert describe_added(model) == KINDS[kind]
    assert any(width.heads < 4 or width.neurons < 64 for width in layer_widths(model))

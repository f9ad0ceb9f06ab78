"""A fine-tuning stage on a tiny pretrained model, run in this process."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from finetune_parts import TINY, Silent, Stage

from stages.core.artifacts import write_manifest
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.finetune.__main__ import run_finetune


@pytest.fixture(scope="session")
def tiny_pretrained(tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit of a pretrained encoder: what the tiny classifier learned, without its head and pooler."""
    from transformers import BertForMaskedLM

    from stages.core.checkpoints import load_model, save_model

    classifier: Any = load_model(tiny_checkpoint)
    torch.manual_seed(1)
    model = BertForMaskedLM(copy.deepcopy(classifier.config))
    model.bert.load_state_dict(classifier.bert.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("pretrained")
    save_model(model, folder, tiny_tokenizer, [{"stage": "pretrain"}])
    write_manifest(folder)
    return folder


@pytest.fixture
def finetune(tiny_pretrained: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Runs the stage with changed params; `interrupt_at` presses Ctrl-C when so many losses were computed.

    Runs of one `name` share their resume state.
    """
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = ("cat", "dog", "one", "two", "paris", "hill")
    texts = [f"{opening} {word} ?" for opening in ("what is the", "who is a", "where is", "how many") for word in words]
    pandas.DataFrame({"text": texts}).to_parquet(corpus / "corpus.parquet")
    write_manifest(corpus)
    inputs = {"model": tiny_pretrained, "data": tiny_data, "corpus": corpus}

    def run(name: str = "out", interrupt_at: int | None = None, **changes: Any) -> tuple[dict[str, Any], StageRun]:
        raw = copy.deepcopy(TINY)
        raw["finetune"] |= {"epochs": 2, "patience": 2, **changes}
        raw["finetune"]["optimizer"] |= {"precision": "fp32", "batch_tokens": 128, "learning_rate": 5.0e-3}
        staging = tmp_path / f"{name}-{interrupt_at}-{len(list(tmp_path.iterdir()))}"
        staging.mkdir()
        stage_run = StageRun(
            "finetune", parse_params(raw, "tiny"), inputs, staging, tmp_path / f"state-{name}", Silent()
        )  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            if interrupt_at is not None:
                _interrupt(patch, interrupt_at)
            return run_finetune(stage_run), stage_run

    return run


def _interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    from stages.core.tasks import TextClassification

    usual, asked = TextClassification.loss, [0]

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        asked[0] += 1
        if asked[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(*arguments, **named)

    patch.setattr(TextClassification, "loss", loss)

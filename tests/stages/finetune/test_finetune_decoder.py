"""Fine-tuning a decoder: its embedding knows no padding, and its classifier looks for the end of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_parts import Stage
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from stages.core.artifacts import write_manifest
from stages.core.checkpoints import save_model
from stages.core.errors import UserError


@pytest.fixture(scope="session")
def tiny_pretrained(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit of a decoder, in place of the encoder that the other tests fine-tune."""
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=tokenizer.pad_token_id
    )
    folder = tmp_path_factory.mktemp("decoder")
    save_model(GPT2LMHeadModel(config), folder, tiny_tokenizer, [{"stage": "pretrain"}])
    write_manifest(folder)
    return folder


def test_a_decoder_is_fine_tuned_on_padded_batches(finetune: Stage) -> None:
    metrics, run = finetune(adversarial=None)
    assert metrics["epochs"] == 2
    assert (run.staging / "model" / "model.safetensors").exists()


def test_mixed_texts_without_an_end_are_refused(finetune: Stage) -> None:
    with pytest.raises(UserError, match=r"finetune\.mixup: the classifier of gpt2 finds the end of a text"):
        finetune(adversarial=None, mixup=0.4)

"""Quick attention and dropout compute what PyTorch's own do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from stages.core.training.processors import ATTENTION, QuickDropout, quick_dropout, quick_on_processors

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.AutoModelForMaskedLM, transformers.BertConfig(**SIZES)),
    "modernbert": (
        transformers.AutoModelForMaskedLM,
        transformers.ModernBertConfig(**SIZES, local_attention=4, pad_token_id=0, cls_token_id=2, sep_token_id=3),
    ),
    "gpt2": (
        transformers.AutoModelForCausalLM,
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=40),
    ),
    "llama": (transformers.AutoModelForCausalLM, transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "t5": (
        transformers.AutoModelForSeq2SeqLM,
        transformers.T5Config(
            vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
    "bart": (
        transformers.AutoModelForSeq2SeqLM,
        transformers.BartConfig(
            vocab_size=60,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=40,
        ),
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_the_usual_attention(family: str) -> None:
    torch.manual_seed(0)
    kind, config = MODELS[family]
    model = kind.from_config(config).eval()  # no dropout
    ids = torch.randint(5, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 7:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)  # what padding sees is nobody's business

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        parts = [part.grad.flatten() for part in model.parameters() if part.grad is not None]
        return loss.detach(), torch.cat(parts)

    usual = gradients()
    assert model.config._attn_implementation == "sdpa"
    with quick_on_processors(model):
        assert model.config._attn_implementation == ATTENTION
        quick = gradients()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(quick, usual, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(1_000_001, requires_grad=True)
    kept = quick_dropout(values, probability)
    share = float((kept == 0).float().mean())
    assert abs(share - probability) < 0.002  # four standard errors
    if probability < 1.0:
        assert abs(float(kept.detach().mean()) - 1.0) < 0.005
        assert torch.equal(
            kept.detach().unique(), torch.tensor(sorted({0.0, float(kept.detach().max())})[probability == 0.0 :])
        )
    kept.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, kept.detach())


def test_neighbours_are_dropped_apart() -> None:
    """Four values share a random number; they must not share a fate."""
    torch.manual_seed(0)
    dropped = (quick_dropout(torch.ones(400_000), 0.3) == 0).view(-1, 4).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.015


def test_the_same_seed_drops_the_same() -> None:
    torch.manual_seed(5)
    first = quick_dropout(torch.ones(1001), 0.2)
    torch.manual_seed(5)
    assert torch.equal(quick_dropout(torch.ones(1001), 0.2), first)


def test_dropouts_come_back_also_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    usual = model[1]
    with pytest.raises(KeyError), quick_on_processors(model):
        assert isinstance(model[1], QuickDropout)
        assert model[1].p == 0.3
        model.eval()
        assert torch.equal(model[1](torch.ones(5)), torch.ones(5))
        raise KeyError
    assert model[1] is usual
    assert not usual.training

"""What is counted as work, against models counted by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from stages.core.training import throughput
from stages.core.training.recipe import Position
from stages.core.training.throughput import Arithmetic, Meter, count_tokens

CONFIG = transformers.BertConfig(
    vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20
)
LAYER = 4 * 8 * 8 + 2 * 8 * 20


def test_a_language_model_counted_by_hand() -> None:
    model = transformers.BertForMaskedLM(CONFIG)
    counted = Arithmetic.of(model)
    # embeddings of tokens, positions and segments multiply nothing; the head is a layer and the tied decoder
    assert counted == Arithmetic(body=3.0 * LAYER, head=8.0 * 8 + 8 * 50, attention=24.0)
    assert counted.operations(tokens=10, pairs=50, labels=2) == 6 * (3 * LAYER * 10 + 464 * 2) + 12 * 24 * 50


def test_a_classifier_pools_once_a_text() -> None:
    counted = Arithmetic.of(transformers.BertForSequenceClassification(CONFIG))
    assert (counted.body, counted.head) == (3.0 * LAYER, 8.0 * 8 + 8 * 2)


def test_shared_layers_count_each_time() -> None:
    config = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
    )
    body = Arithmetic.of(transformers.AlbertForMaskedLM(config)).body
    assert body == 3.0 * (LAYER + 8 * 8)  # the mapping of the embeddings, small, is counted with the layers


def test_other_products_count_too() -> None:
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
    assert Arithmetic.of(gpt).body == 4 * 8 * 8 + 2 * 8 * 32
    assert Arithmetic.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))) == Arithmetic(16.0, 0.0, 0.0)


def test_what_has_two_kinds_of_tokens_or_models_is_not_counted() -> None:
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1))
    assert Arithmetic.of(t5) is None
    pair = nn.ModuleDict({"one": transformers.BertModel(CONFIG), "other": transformers.BertModel(CONFIG)})
    assert Arithmetic.of(pair) is None
    meter = Meter(pair, "fp32", "cpu", 1)
    with meter.running(Position()):
        meter.add({"targets": torch.zeros(5)}, labels=5.0)
        assert set(meter.read()) == {"tokens_per_second", "seconds"}


def test_padding_counts_for_nothing() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert count_tokens({"input_ids": mask, "attention_mask": mask}) == (4.0, 10.0)
    assert count_tokens({"seen": mask, "documents": torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])}) == (7.0, 21.0)
    assert count_tokens({"seen": mask}) == (8.0, 32.0)
    assert count_tokens({"targets": torch.zeros(5)}) == (5.0, 5.0)


def test_speed_is_work_over_time_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "ceiling", lambda precision, device: 2400.0)
    position = Position(seconds=7.0)
    meter = Meter(nn.Linear(4, 4), "fp32", "cpu", 2)
    for _ in range(2):
        with meter.running(position):
            now[0] += 2.0
            meter.add({"attention_mask": torch.ones(5, 10)}, labels=5.0)
        now[0] += 50.0  # an evaluation
    with meter.running(position):
        read = meter.read()
    # 100 tokens in 4 s; 6 operations for each of 16 weights and 100 tokens, of 2400 a second in each of two processes
    assert read == {"tokens_per_second": 25.0, "flops_utilization": 0.5, "seconds": 11.0}
    assert meter.shown == "25 tokens/s, 50% of fp32 products"


def test_the_ceiling_is_measured_without_drawing_numbers() -> None:
    before = torch.get_rng_state()
    assert throughput.ceiling("fp32", "cpu") > 1e9
    assert torch.equal(torch.get_rng_state(), before)

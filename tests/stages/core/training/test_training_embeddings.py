"""Training only the embeddings that occur is training all of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from stages.core.training.embeddings import CompactEmbedding, compact_embeddings

TOKENS = {5, 7, 8, 20, 31}


def _model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config)


def _train(model: nn.Module, weight_decay: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    known = torch.tensor(sorted(TOKENS | {0}))
    model.train()
    for _ in range(5):
        ids = known[torch.randint(len(known), (4, 6), generator=generator)]
        labels = torch.randint(2, (4,), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_that_occur_move_as_in_dense_training(weight_decay: float) -> None:
    dense, compact = _model(), _model()
    before = _state(dense)["bert.embeddings.word_embeddings.weight"]
    _train(dense, weight_decay)
    with compact_embeddings(compact, TOKENS):
        assert isinstance(compact.get_input_embeddings(), CompactEmbedding)  # type: ignore[operator]
        _train(compact, weight_decay)
    wanted, got = _state(dense), _state(compact)
    name = "bert.embeddings.word_embeddings.weight"
    trained, others = sorted(TOKENS), sorted(set(range(40)) - TOKENS - {0})
    assert (got[name][trained] - before[trained]).abs().min() > 0.0
    torch.testing.assert_close(got[name][trained], wanted[name][trained], atol=1e-6, rtol=1e-5)
    # rows that never occur stay, where dense training shrinks them by its weight decay and nothing else
    assert torch.equal(got[name][others], before[others])
    torch.testing.assert_close(wanted[name][others], before[others] * (1 - 1e-2 * weight_decay) ** 5)
    for other in wanted.keys() - {name}:
        torch.testing.assert_close(got[other], wanted[other], atol=1e-6, rtol=1e-5)


def test_the_model_leaves_as_it_came() -> None:
    model = _model()
    before = model.get_input_embeddings()  # type: ignore[operator]
    names = list(model.state_dict())
    with compact_embeddings(model, TOKENS):
        assert list(model.state_dict()) == names
    assert model.get_input_embeddings() is before  # type: ignore[operator]
    assert list(model.state_dict()) == names


def test_evaluation_knows_every_token_and_training_refuses_others() -> None:
    model = _model().eval()
    ids = torch.tensor([[5, 6, 31, 0, 39]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with compact_embeddings(model, TOKENS):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted)
            model.train()
            with pytest.raises(ValueError, match="token 6 is not among"):
                model(input_ids=ids)


def test_tied_and_frozen_embeddings_stay_dense() -> None:
    frozen = _model()
    frozen.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    tied = transformers.AutoModelForMaskedLM.from_config(_model().config)
    for model in (frozen, tied):
        with compact_embeddings(model, TOKENS):
            assert type(model.get_input_embeddings()) is nn.Embedding
    with compact_embeddings(nn.Linear(2, 2), None):
        pass

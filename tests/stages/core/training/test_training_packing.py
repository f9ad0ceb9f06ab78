"""Documents packed into one block are seen as if each were alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.core.masked_language import chosen_logits
from stages.core.packing import attention_within, check_packable, packed_inputs, positions_within
from stages.core.training.processors import quick_on_processors
from stages.tokenize.pack import pack_apart

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=8),
    "albert": transformers.AlbertConfig(**SIZES, embedding_size=8),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40
    ),
    "modernbert": transformers.ModernBertConfig(
        **SIZES, local_attention=64, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    ),
}
ROWS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33], [41]]


def test_positions_start_anew_as_worked_by_hand() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 1, 2]]
    assert positions_within(documents, first=2)[0].tolist() == [2, 3, 4, 2, 3, 2]


def test_attention_stays_inside_documents() -> None:
    mask = attention_within(torch.tensor([[0, 0, 1, -1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def _hidden(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(input_ids=ids, **inputs).last_hidden_state
    return hidden


@pytest.mark.parametrize("quick", [False, True], ids=["as it comes", "quick"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_document_has_the_states_it_has_alone(family: str, quick: bool) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[family]).eval()
    pad = model.config.pad_token_id
    blocks, documents = (torch.from_numpy(part).long() for part in pack_apart(ROWS, 3, 2, pad, 12))
    with quick_on_processors(model) if quick else nullcontext():
        packed = _hidden(model, blocks, **packed_inputs(model, documents))
        for block, numbers, states in zip(blocks, documents, packed, strict=True):
            for number in range(int(numbers.max()) + 1):
                own = block[numbers == number].unsqueeze(0)
                alone = _hidden(model, own)[0]
                torch.testing.assert_close(states[numbers == number], alone, atol=1e-5, rtol=1e-5)


def test_logits_of_packed_documents_are_those_they_have_alone() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(CONFIGS["bert"]).eval()
    blocks, documents = (torch.from_numpy(part).long() for part in pack_apart(ROWS[1:3], 3, 2, 0, 9))
    with torch.no_grad():
        packed = chosen_logits(model, blocks, documents == 1, **packed_inputs(model, documents))
        alone = model(input_ids=blocks[documents == 1].unsqueeze(0)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_attention_that_adds_its_mask_keeps_documents_apart_too() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["bert"])
    config._attn_implementation = "eager"
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    check_packable(model, 24)
    blocks, documents = (torch.from_numpy(part).long() for part in pack_apart(ROWS[1:3], 3, 2, 0, 9))
    with torch.no_grad():
        packed = model(input_ids=blocks, **packed_inputs(model, documents)).logits[documents == 1]
        alone = model(input_ids=blocks[documents == 1].unsqueeze(0)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_models_that_keep_documents_apart_are_taken(family: str) -> None:
    model = transformers.AutoModelForMaskedLM.from_config(CONFIGS[family]).train()
    before = torch.get_rng_state()
    check_packable(model, 24)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_window_of_attention_that_the_mask_would_replace_is_refused() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["modernbert"])
    config.local_attention = 4
    model = transformers.AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UserError, match="ModernBertForMaskedLM cannot keep the documents of a block apart"):
        check_packable(model, 24)


def test_joined_documents_are_not_alone() -> None:
    """The tests above could not fail if attention did not matter at all."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS["bert"]).eval()
    block = torch.tensor([[2, 11, 12, 3, 2, 21, 22, 3]])
    assert (_hidden(model, block)[:, :4] - _hidden(model, block[:, :4])).abs().max() > 1e-3


def test_best_fit_as_worked_by_hand() -> None:
    blocks, documents = pack_apart(ROWS, separator=3, begin=2, pad=0, length=9)
    # sizes with both special tokens: 7, 4, 5, 3; 7 alone leaves 2, 5 and 4 fill a block, 3 opens one of its own
    assert blocks.tolist() == [
        [2, 11, 12, 13, 14, 15, 3, 0, 0],
        [2, 31, 32, 33, 3, 2, 21, 22, 3],
        [2, 41, 3, 0, 0, 0, 0, 0, 0],
    ]
    assert documents.tolist() == [[0] * 7 + [-1] * 2, [0] * 5 + [1] * 4, [0] * 3 + [-1] * 6]


@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=30), max_size=30), st.integers(3, 16))
def test_packing_apart_keeps_every_token_and_its_neighbours(rows: list[list[int]], length: int) -> None:
    blocks, documents = pack_apart(rows, separator=3, begin=2, pad=0, length=length)
    found = []
    for block, numbers in zip(blocks, documents, strict=True):
        for number in range(numbers.max() + 1):
            piece = block[numbers == number].tolist()
            assert (piece[0], piece[-1]) == (2, 3)
            found.append(piece[1:-1])
        assert (block[numbers < 0] == 0).all()
    wanted = [row[at : at + length - 2] for row in rows for at in range(0, len(row), length - 2)]
    assert sorted(found) == sorted(wanted)
    # best fit leaves no two blocks that would go into one
    sizes = sorted((numbers >= 0).sum() for numbers in documents)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > length

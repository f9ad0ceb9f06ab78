from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from stages.core import augmentation
from stages.core.augmentation import augmented_rows, choose_positions, draw_tokens
from stages.core.checkpoints import load_tokenizer
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.params import AugmentationParams

SPECIAL = numpy.array([0, 1, 2, 3, 4])
PARAMS = AugmentationParams(copies=2, mask_probability=0.3, candidates=5)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def language_model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("language-model")
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_only_masked_positions_change_and_special_tokens_stay(
    language_model: Path, tokenizer: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_examples(tiny_data, "train").input_ids
    masked: dict[tuple[int, ...], list[list[int]]] = {}

    def remember(row: list[int], *rest: Any) -> numpy.ndarray:
        positions = choose_positions(row, *rest)
        masked.setdefault(tuple(row), []).append(positions.tolist())
        return positions

    monkeypatch.setattr(augmentation, "choose_positions", remember)
    made = augmented_rows(rows, PARAMS, language_model, tokenizer, 7)
    assert len(made) > len(rows)
    for variant in made:
        origins = [
            (row, positions)
            for row, chosen in masked.items()
            for positions in chosen
            if len(row) == len(variant)
            and all(a == b for place, (a, b) in enumerate(zip(row, variant, strict=True)) if place not in positions)
        ]
        assert origins
        assert variant[0] == tokenizer.cls_token_id
        assert variant[-1] == tokenizer.sep_token_id
        assert not set(variant[1:-1]) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def test_variants_are_new_distinct_and_follow_from_the_seed(
    language_model: Path, tokenizer: Any, tiny_data: Path
) -> None:
    rows = load_examples(tiny_data, "train").input_ids
    before = torch.get_rng_state()
    one = augmented_rows(rows, PARAMS, language_model, tokenizer, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == augmented_rows(rows, PARAMS, language_model, tokenizer, 7)
    assert one != augmented_rows(rows, PARAMS, language_model, tokenizer, 8)
    distinct = {tuple(row) for row in one}
    assert len(distinct) == len(one)
    assert not distinct & {tuple(row) for row in rows}


def test_at_least_one_token_is_chosen_and_never_a_special_one() -> None:
    row = [2, 10, 11, 12, 3]
    for seed in range(50):
        positions = choose_positions(row, SPECIAL, 1e-9, numpy.random.default_rng(seed))
        assert len(positions) == 1
        assert 1 <= positions[0] <= 3
    assert choose_positions(row, SPECIAL, 1.0 - 1e-12, numpy.random.default_rng(0)).tolist() == [1, 2, 3]
    assert choose_positions([2, 3], SPECIAL, 0.5, numpy.random.default_rng(0)).tolist() == []


def test_tokens_are_chosen_as_often_as_asked() -> None:
    chance = numpy.random.default_rng(0)
    row = [2, *range(10, 60), 3]
    share = numpy.mean([len(choose_positions(row, SPECIAL, 0.3, chance)) for _ in range(400)]) / 50
    assert share == pytest.approx(0.3, abs=0.01)


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    """Of special (9), 0.6, 0.3, 0.1: two candidates leave two thirds and one third."""
    logits = torch.cat([torch.tensor([9.0]), torch.tensor([0.6, 0.3, 0.1]).log()]).repeat(3000, 1)
    luck = (torch.arange(3000) + 0.5) / 3000
    drawn = draw_tokens(logits, numpy.array([0]), 2, luck)
    assert torch.bincount(drawn, minlength=4).tolist() == [0, 2000, 1000, 0]
    assert set(draw_tokens(logits, numpy.array([0]), 99, luck).tolist()) == {1, 2, 3}


def test_a_model_that_guesses_no_masked_tokens_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"distill\.transfer\.augmentation\.copies: .* has no masked-language head"):
        augmented_rows([[2, 7, 3]], PARAMS, tmp_path, tokenizer, 0)

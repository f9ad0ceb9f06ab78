from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.checkpoints import load_tokenizer
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.noise import break_row, noised_rows
from stages.core.params import NoiseParams

CLS, SEP, MASK = 1, 2, 3
SPECIAL = {0, CLS, SEP, MASK}
WORDS = numpy.array([100, 101, 102])
PARAMS = NoiseParams(copies=2, mask_probability=0.2, replace_probability=0.3, cut_probability=0.5)


def broken(row: list[int], seed: int, **changes: float) -> list[int]:
    params = PARAMS.model_copy(update=changes)
    return break_row(row, SPECIAL, WORDS, MASK, params, numpy.random.default_rng(seed))


@given(st.lists(st.integers(10, 20), max_size=12), st.integers(0, 2**32 - 1))
def test_the_ends_stay_and_at_least_half_of_the_text_is_left(body: list[int], seed: int) -> None:
    row = broken([CLS, *body, SEP], seed)
    assert (row[0], row[-1]) == (CLS, SEP)
    assert (len(body) + 1) // 2 <= len(row) - 2 <= len(body)
    assert set(row[1:-1]) <= {*body, *WORDS.tolist(), MASK}


@given(st.lists(st.integers(10, 20), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_a_cut_alone_leaves_a_piece_of_the_text(body: list[int], seed: int) -> None:
    row = broken([CLS, *body, SEP], seed, mask_probability=0.0, replace_probability=0.0, cut_probability=1.0)[1:-1]
    assert any(body[start : start + len(row)] == row for start in range(len(body)))


def test_tokens_are_masked_and_replaced_as_often_as_asked() -> None:
    body = list(range(1000, 21000))
    row = broken([CLS, *body, SEP], 0, cut_probability=0.0)[1:-1]
    assert row.count(MASK) / len(body) == pytest.approx(0.2, abs=0.01)
    assert sum(token in WORDS for token in row) / len(body) == pytest.approx(0.3, abs=0.015)


def test_a_text_of_special_tokens_alone_is_left_as_it_is() -> None:
    assert broken([CLS, SEP], 0) == [CLS, SEP]


def test_variants_are_new_and_the_same_for_the_same_seed(tiny_tokenizer: Path, tiny_data: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_tokenizer)
    rows = load_examples(tiny_data, "train").input_ids
    made = noised_rows(rows, PARAMS, tokenizer, seed=5)
    assert made
    assert len({tuple(row) for row in made}) == len(made)
    assert not {tuple(row) for row in made} & {tuple(row) for row in rows}
    assert made == noised_rows(rows, PARAMS, tokenizer, seed=5)
    assert made != noised_rows(rows, PARAMS, tokenizer, seed=6)


def test_masking_without_a_mask_token_is_refused(tiny_tokenizer: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"distill\.transfer\.noise\.mask_probability"):
        noised_rows([[5, 6]], PARAMS, tokenizer, seed=0)

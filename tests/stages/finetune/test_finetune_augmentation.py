"""Copies of texts: what each edit may change, and whose label a copy has."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import write_json
from stages.core.checkpoints import load_tokenizer
from stages.core.encoding import encode, read_tokenizer
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples
from stages.core.params import AugmentationParams, FinetuneAugmentation, WordEdits
from stages.finetune.augmentation import add_copies, edited_examples, guessed_examples
from stages.finetune.word_edits import delete_words, edited, insert_synonyms, replace_by_synonyms, swap_words

SYNONYMS = {"town": ["city", "borough"], "big": ["large"], "in": ["inch"], "Paris": ["Lutetia"]}
TEXT = "how big is the town in Paris ?"
ALL = WordEdits(copies=2, synonyms=0.2, insertions=0.2, swaps=0.2, deletions=0.2)
GUESSES = AugmentationParams(copies=2, mask_probability=0.3, candidates=5)


def only(**shares: float) -> WordEdits:
    return WordEdits(**{"copies": 1, "synonyms": 0.0, "insertions": 0.0, "swaps": 0.0, "deletions": 0.0, **shares})


def test_synonyms_take_the_place_of_words_that_have_some() -> None:
    found = {replace_by_synonyms(TEXT, 0.1, SYNONYMS, random.Random(seed)) for seed in range(50)}
    assert found == {
        "how large is the town in Lutetia ?".replace("Lutetia", "Paris"),
        "how big is the city in Paris ?",
        "how big is the borough in Paris ?",
        "how big is the town in Lutetia ?",
    }
    many = replace_by_synonyms(TEXT, 1.0, SYNONYMS, random.Random(0))
    assert many.split()[1] == "large"
    assert many.split()[5:] == ["in", "Lutetia", "?"]  # "in" is a stop word, not an inch


def test_insertions_add_synonyms_and_keep_the_text_in_order() -> None:
    found = insert_synonyms(TEXT, 0.25, SYNONYMS, random.Random(1)).split()
    added = Counter(found) - Counter(TEXT.split())
    assert added.total() == 2
    assert set(added) <= {"city", "borough", "large", "Lutetia"}
    assert [word for word in found if word in TEXT.split()] == TEXT.split()


@given(st.lists(st.sampled_from(["a", "b", "c", "?"]), min_size=2, max_size=9), st.integers(0, 99))
def test_swaps_keep_the_words_and_deletions_their_order(words: list[str], seed: int) -> None:
    text = " ".join(words)
    assert Counter(swap_words(text, 0.3, random.Random(seed)).split()) == Counter(words)
    kept = delete_words(text, 0.5, random.Random(seed)).split()
    rest = iter(words)
    assert kept
    assert all(word in rest for word in kept)  # a subsequence


def test_as_many_words_are_left_out_as_asked() -> None:
    text = " ".join(["word"] * 4000)
    assert len(delete_words(text, 0.3, random.Random(0)).split()) == pytest.approx(2800, rel=0.05)
    assert delete_words(text, 1.0, random.Random(0)) == "word"


def test_a_copy_is_edited_in_one_of_the_ways_that_are_on_and_always_the_same() -> None:
    assert edited(TEXT, ALL, SYNONYMS, 17, 0) == edited(TEXT, ALL, SYNONYMS, 17, 0)
    assert len({edited(TEXT, ALL, SYNONYMS, seed, 0) for seed in range(30)}) > 10
    swapped = edited(TEXT, only(swaps=0.1), SYNONYMS, 17, 0)
    assert swapped != TEXT
    assert Counter(swapped.split()) == Counter(TEXT.split())
    assert edited("why", only(swaps=0.1, synonyms=0.5), SYNONYMS, 17, 0) == "why"


@pytest.fixture(scope="module")
def language_model(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(load_tokenizer(tiny_tokenizer)), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("language-model")
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_edited_copies_have_the_label_of_their_text_and_their_own_tokens(tiny_data: Path) -> None:
    # Each text says its label, so that a copy's label can be read from it: no edit takes these words.
    texts = [f"label{number % 3} what is the town of number{number}" for number in range(30)]
    examples = Examples(texts, [[0]] * 30, numpy.arange(30) % 3)
    more = edited_examples(examples, only(copies=3, swaps=0.1, insertions=0.1), tiny_data, SYNONYMS, 17)
    assert 60 < len(more) <= 90
    assert len(set(more.texts) | set(texts)) == len(more) + 30
    for text, label in zip(more.texts, more.labels, strict=True):
        assert f"label{label}" in text.split()
    assert more.input_ids == encode(read_tokenizer(tiny_data / "tokenizer", 24), more.texts)


def test_guessed_copies_have_the_label_of_their_text(tiny_data: Path, language_model: Path) -> None:
    examples = load_examples(tiny_data, "train")
    more = guessed_examples(examples, GUESSES, tiny_data, language_model, seed=17)
    own = {tuple(row) for row in examples.input_ids}
    assert len(more) > len(examples)
    assert not own & {tuple(row) for row in more.input_ids}
    assert len({tuple(row) for row in more.input_ids}) == len(more)
    for row, label in zip(more.input_ids, more.labels, strict=True):
        # The text it was made of has its length and most of its tokens.
        alike = [sum(a == b for a, b in zip(row, other, strict=True)) if len(row) == len(other) else -1
                 for other in examples.input_ids]  # fmt: skip
        best = max(alike)
        assert label in {examples.labels[index] for index, count in enumerate(alike) if count == best}


def test_copies_stand_behind_the_texts(tiny_data: Path, language_model: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "synonyms.json", SYNONYMS)
    examples = load_examples(tiny_data, "train")
    params = FinetuneAugmentation(edits=ALL, guesses=GUESSES)
    both = add_copies(examples, params, tiny_data, language_model, tmp_path, 17)
    assert both.texts[:60] == examples.texts
    assert len(both) == len(both.input_ids) == len(both.labels) > 150
    none = FinetuneAugmentation(edits=None, guesses=None)
    assert add_copies(examples, none, tiny_data, language_model, None, 17) is examples


def test_what_copies_need_must_be_there(tiny_data: Path, language_model: Path, tiny_checkpoint: Path) -> None:
    examples = load_examples(tiny_data, "train")
    with pytest.raises(UserError, match="--lexicon"):
        add_copies(examples, FinetuneAugmentation(edits=ALL, guesses=None), tiny_data, language_model, None, 17)
    with pytest.raises(UserError, match="BertForSequenceClassification, which has no masked-language head"):
        add_copies(examples, FinetuneAugmentation(edits=None, guesses=GUESSES), tiny_data, tiny_checkpoint, None, 17)

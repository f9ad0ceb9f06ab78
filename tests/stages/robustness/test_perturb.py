from __future__ import annotations

import re
import unicodedata
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.params import Perturbation
from stages.robustness.perturb import PERTURBATIONS, Material, perturb

NAMES: tuple[Perturbation, ...] = get_args(Perturbation)
CASES: tuple[Perturbation, ...] = ("upper_case", "lower_case", "title_case", "random_case")
MATERIAL = Material({"film": ["movie"], "big": ["large", "huge"]}, ["It rained.", "That is all."])
ANY_TEXT = st.text(max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["What", "is", "not", "the", "BIG", "film", "don't", "can't", "O'Neill", "big,", "Ünder", "one", "?", "!"]
    ),
    min_size=1,
)
ENGLISH = WORDS.map(" ".join)
STRENGTHS = st.floats(0.0, 1.0)


def done(name: Perturbation, text: str, strength: float = 1.0, copy: int = 0) -> str:
    return perturb(name, text, strength, MATERIAL, 17, copy)


def test_every_perturbation_of_the_params_is_there() -> None:
    assert tuple(PERTURBATIONS) == NAMES


@given(st.sampled_from(NAMES), ANY_TEXT | ENGLISH)
def test_at_strength_0_nothing_changes(name: Perturbation, text: str) -> None:
    assert done(name, text, 0.0) == text


@given(st.sampled_from(NAMES), ANY_TEXT | ENGLISH, STRENGTHS)
def test_the_same_call_gives_the_same_text(name: Perturbation, text: str, strength: float) -> None:
    assert done(name, text, strength) == done(name, text, strength)


def test_copies_and_seeds_have_chance_of_their_own() -> None:
    text = "how many different words does a text like this one have"
    assert len({done("typos", text, 0.5, copy) for copy in range(5)}) == 5
    assert perturb("typos", text, 0.5, MATERIAL, 1, 0) != perturb("typos", text, 0.5, MATERIAL, 2, 0)


@given(st.sampled_from(CASES), ANY_TEXT, STRENGTHS)
def test_cases_leave_the_words_what_they_are(name: Perturbation, text: str, strength: float) -> None:
    assert done(name, text, strength).casefold() == text.casefold()


def test_cases_do_what_they_are_called() -> None:
    text = "Who was the man from NASA ?"
    assert done("upper_case", text) == "WHO WAS THE MAN FROM NASA ?"
    assert done("lower_case", text) == "who was the man from nasa ?"
    assert done("title_case", text) == "Who Was The Man From Nasa ?"
    assert done("random_case", text) == "wHO WAS THE MAN FROM nasa ?"
    assert done("upper_case", "\u0131") == "\u0131"  # a dotless i has no capital of its own


@given(ANY_TEXT | ENGLISH, STRENGTHS)
def test_a_truncated_text_is_a_prefix(text: str, strength: float) -> None:
    cut = done("truncation", text, strength)
    assert text.startswith(cut)
    assert bool(cut.strip()) == bool(text.strip())


def test_truncation_counts_words_and_not_marks() -> None:
    ten = "a b c d e f g h i j ?"
    assert done("truncation", ten, 0.2) == "a b c d e f g h"
    assert done("truncation", ten, 0.01) == ten
    assert done("truncation", ten, 1.0) == "a"


@given(ENGLISH, STRENGTHS)
def test_dropped_words_leave_the_others_in_order(text: str, strength: float) -> None:
    kept, words = done("word_drop", text, strength).split(), iter(text.split())
    assert kept
    assert all(word in words for word in kept)


@given(ANY_TEXT, STRENGTHS)
def test_removing_punctuation_removes_nothing_else(text: str, strength: float) -> None:
    def plain(text: str) -> str:
        return "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))

    assert plain(done("punctuation_removed", text, strength)) == plain(text)


@given(ENGLISH, STRENGTHS)
def test_added_punctuation_is_all_that_is_added(text: str, strength: float) -> None:
    pairs = list(zip(text.split(" "), done("punctuation_added", text, strength).split(" "), strict=True))
    assert all(new in (old, *(old + mark for mark in ".,;:!?-")) for old, new in pairs)


def test_punctuation_alone_stays() -> None:
    assert done("punctuation_removed", "?!") == "?!"
    assert done("punctuation_removed", "U.S. (why?)") == "US why"


@given(ANY_TEXT, STRENGTHS)
def test_look_alikes_take_the_place_of_latin_letters(text: str, strength: float) -> None:
    changed = done("look_alikes", text, strength)
    assert len(changed) == len(text)
    for old, new in zip(text, changed, strict=True):
        names = unicodedata.name(old, ""), unicodedata.name(new, "")
        assert old == new or (names[0].startswith("LATIN") and names[1].startswith(("CYRILLIC", "GREEK")))
        assert unicodedata.category(old) == unicodedata.category(new)


def test_every_look_alike_is_used_at_full_strength() -> None:
    assert not re.search("[aceopxyABCEHKMOPTX]", done("look_alikes", "peace ox ABC HEMP OXY KTX"))


@given(st.text("abcdefghijXYZ", min_size=1, max_size=12))
def test_a_slip_keeps_the_first_letter_and_nearly_the_length(word: str) -> None:
    slipped = done("typos", word)
    if len(word) < 3:
        assert slipped == word
    else:
        assert slipped[0] == word[0]
        assert abs(len(slipped) - len(word)) <= 1
        assert sum(a != b for a, b in zip(word, slipped, strict=False)) <= len(word)


def test_all_four_kinds_of_slips_happen() -> None:
    slips = {done("typos", "dogma", 1.0, copy) for copy in range(200)}
    assert {"dgma", "doogma", "dpgma", "dgoma"} <= slips
    assert "dogma" not in slips
    assert {slip.split()[1] for slip in (done("typos", "a bcd", 1.0, copy) for copy in range(50))} >= {"bd", "bdc"}


def test_synonyms_come_for_small_words_alone() -> None:
    assert done("synonyms", "a film in Film City, FILM filming") == "a movie in Film City, FILM filming"
    assert {done("synonyms", "big", 1.0, copy) for copy in range(30)} == {"large", "huge"}


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("Who was the man ?", "Who was not the man ?"),
        ("It was not good", "It was good"),
        ("Not a good film", "a good film"),
        ("It doesn't work", "It does work"),
        ("I won't go", "I will go"),
        ("Can’t you see", "Can you see"),
        ("We cannot see", "We can see"),
        ("I never slept", "I slept"),
        ("A knot of notes", "A knot of notes"),
        ("no verb here", "no verb here"),
    ],
)
def test_negation_is_put_in_or_taken_out(text: str, negated: str) -> None:
    assert done("negation", text) == negated


@given(
    st.lists(st.sampled_from(["who", "is", "are", "the", "big", "Film", "could", "one", "?"]), min_size=1).map(" ".join)
)
def test_negating_twice_is_no_negation(text: str) -> None:
    assert done("negation", done("negation", text)) == text


@given(ANY_TEXT)
def test_a_longer_text_starts_with_the_text(text: str) -> None:
    assert done("length", text) in [f"{text} {sentence}" for sentence in MATERIAL.neutral_sentences]

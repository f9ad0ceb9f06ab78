from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.texts import comparable, words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's  new ?", "what s new"),
        ("STRASSE", "straße"),
        ("“Quoted” — text…", "quoted text"),
        ("今天天气很好！", "今天天气很好"),
    ],
)
def test_case_punctuation_and_spacing_do_not_count(one: str, other: str) -> None:
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(("one", "other"), [(":)", ":("), ("good 😀", "good 😡"), ("$5", "£5"), ("कि", "की")])
def test_meaning_counts(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)


def test_only_blank_texts_are_empty() -> None:
    assert comparable(" \n") == ""
    assert comparable("?!") == "?!"


@given(st.text(max_size=40))
def test_comparable_is_stable(text: str) -> None:
    assert comparable(comparable(text)) == comparable(text)


def test_scripts_without_spaces_are_cut_into_characters() -> None:
    assert words("who is mao 毛泽东 really") == ["who", "is", "mao", "毛", "泽", "东", "really"]
    assert words("naïve words") == ["naïve", "words"]

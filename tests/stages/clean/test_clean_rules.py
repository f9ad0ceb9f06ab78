from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.clean.rules import (
    collapse_whitespace,
    drop_control_characters,
    fix_unicode,
    is_plain,
    repair,
    repairs,
    strip_html,
)
from stages.core.params import CleanParams

EVERYTHING = CleanParams(
    fix_unicode=True,
    strip_html=True,
    minimum_characters=1,
    maximum_characters=1000,
    near_duplicates=None,
    corpus_minimum_characters=1,
    corrections=None,
)


def repaired(text: str) -> str:
    return repair(text, repairs(EVERYTHING), lambda rule, before, after: None)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("cafÃ©s of Venice", "cafés of Venice"),
        ("e\u0301", "é"),
        ("“curly” quotes — stay", "“curly” quotes — stay"),
        ("全角！１２", "全角！１２"),
    ],
)
def test_broken_unicode_is_repaired_and_typography_stays(broken: str, whole: str) -> None:
    assert fix_unicode(broken) == whole


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("a < b", "a < b"),
        ("a <b and c> d", "a <b and c> d"),
        ("I <3 you", "I <3 you"),
        ("an <unk> token, a <PERSON>", "an <unk> token, a <PERSON>"),
        ("List<String> x", "List<String> x"),
        ("<b>bo</b>ld", "bold"),
        ("if 1 < 2 then <i>yes</i> & no", "if 1 < 2 then yes & no"),
        ("<unk> and <b>bold</b>", "<unk> and bold"),
        ("<!-- gone -->here", "here"),
        ("<script>var a = 1;</script>text", "text"),
        ('<a href="http://x.y/?a=1&b=2" class=z>link</a>', "link"),
        ("AT&amp;T &lt;3 &#39;quoted&#39;", "AT&T <3 'quoted'"),
        ("AT&T, R&D; you&me", "AT&T, R&D; you&me"),
        ("&lt;b&gt; is a tag", "<b> is a tag"),
    ],
)
def test_html_is_stripped_and_lone_brackets_stay(marked: str, plain: str) -> None:
    assert strip_html(marked) == plain


def test_blocks_part_words() -> None:
    assert repaired("<p>one</p><p>two<br/>three</p>") == "one two three"


def test_control_characters_go_and_joiners_stay() -> None:
    assert drop_control_characters("a\x00b\u200bc\ufeff\x1b[31md\x1b[0m") == "abcd"
    assert drop_control_characters("می\u200cخواهم 👩\u200d🔬") == "می\u200cخواهم 👩\u200d🔬"
    assert repaired("&#0;a&#7;b") == repaired("\ufffda\x07b")


def test_spacing_is_collapsed() -> None:
    assert collapse_whitespace("\ta \u00a0 b\r\n\nc ") == "a b c"


def test_each_repair_that_changed_something_is_noted() -> None:
    notes: list[Any] = []
    repair("<b>x</b>  y", repairs(EVERYTHING), lambda *note: notes.append(note))
    assert notes == [("html", "<b>x</b>  y", "x  y"), ("whitespace", "x  y", "x y")]


def test_repairs_can_be_turned_off() -> None:
    off = EVERYTHING.model_copy(update={"fix_unicode": False, "strip_html": False})
    assert [name for name, _ in repairs(off)] == ["control_characters", "whitespace"]


@given(st.text(st.characters(blacklist_characters="&")))
def test_repairing_twice_changes_nothing(text: str) -> None:
    # Guesses about wrong decodings depend on the spacing around them, and double escapes have two meanings.
    rules = repairs(EVERYTHING.model_copy(update={"fix_unicode": False}))
    once = repair(text, rules, lambda rule, before, after: None)
    assert repair(once, rules, lambda rule, before, after: None) == once


@given(st.text(st.characters(min_codepoint=1, max_codepoint=126), max_size=60))
def test_the_short_cut_for_plain_texts_gives_the_same(text: str) -> None:
    slow = text
    for _, function in repairs(EVERYTHING):
        slow = function(slow)
    assert repaired(text) == slow
    assert not is_plain("a\x07")


@given(st.text(max_size=60))
def test_any_text_can_be_repaired(text: str) -> None:
    after = repaired(text)
    assert after == after.strip()
    after.encode("utf-8")

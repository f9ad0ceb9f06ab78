from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stages.clean.duplicates import LeakIndex, bands, jaccard, near_duplicates, shingles
from stages.core.params import NearDuplicateParams

NEAR = NearDuplicateParams(threshold=0.9, shingle=4, permutations=128)
LONG = "which american city has the largest number of bridges over a river that freezes in winter"


def test_shingles_and_jaccard() -> None:
    assert shingles("abcde", 4) == {"abcd", "bcde"}
    assert shingles("ab", 4) == {"ab"}
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5


def test_the_first_of_near_duplicates_is_kept() -> None:
    texts = ["something else altogether", LONG, f"{LONG}s", "ab", "ac", f"{LONG} x"]
    assert near_duplicates(texts, NEAR) == {2: 1, 5: 1}


def test_a_chain_is_judged_by_what_is_kept() -> None:
    chain = [LONG, LONG + " a" * 4, LONG + " a b c d e f"]
    assert jaccard(shingles(chain[0], 4), shingles(chain[2], 4)) < 0.9
    assert near_duplicates(chain, NEAR).get(2) != 0


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.8, 0.9):
        count = bands(128, threshold)
        assert 128 % count == 0
        assert 1 - (1 - threshold ** (128 // count)) ** count >= 0.999
    assert bands(7, 0.01) == 7


@given(st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=12, unique=True))
def test_whatever_is_removed_is_near_to_something_kept(texts: list[str]) -> None:
    found = near_duplicates(texts, NearDuplicateParams(threshold=0.6, shingle=2, permutations=64))
    for number, original in found.items():
        assert original < number
        assert original not in found
        assert jaccard(shingles(texts[number], 2), shingles(texts[original], 2)) >= 0.6
    assert near_duplicates(texts, NearDuplicateParams(threshold=0.6, shingle=2, permutations=64)) == found


def test_leaks_are_equal_contained_or_near() -> None:
    index = LeakIndex(["who am i", "what is the capital of france", LONG], NEAR)
    assert index.find("who am i") == ("leak", 0)
    assert index.find("he asked himself who am i and left") is None
    assert index.find("well what is the capital of france do you know") == ("leak", 1)
    assert index.find("what is the capital of francesca") is None
    assert index.find(LONG.replace("largest number of bridges", "longest bridge")) is None
    assert index.find(LONG + "s") == ("near_leak", 2)
    assert index.find("nothing of the kind was ever said") is None


def test_leaks_in_scripts_without_spaces() -> None:
    index = LeakIndex(["今天天气很好"], None)
    assert index.find("他说今天天气很好吗") == ("leak", 0)
    assert index.find("今天天气不好") is None


def test_near_leaks_can_be_turned_off() -> None:
    assert LeakIndex([LONG], None).find(LONG + "s") is None

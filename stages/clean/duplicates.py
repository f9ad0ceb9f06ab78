"""Texts that are nearly the same, and corpus texts that give away what is tested."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rensa import RMinHash, RMinHashLSH

from stages.core.params import NearDuplicateParams
from stages.core.texts import words

_SEED = 1  # of the hash functions; the outcome is confirmed exactly, so it only decides what is looked at
_RECALL = 0.999  # share of the pairs at the threshold that locality-sensitive hashing must find
_WINDOW = 4  # words that a corpus text must share with a protected one, in a row, to be looked at closely
_SHORTEST_RATIO = 0.5  # texts whose lengths differ more cannot be near duplicates worth comparing


def near_duplicates(texts: Sequence[str], params: NearDuplicateParams) -> dict[int, int]:
    """Find texts that nearly equal an earlier one that is kept.

    Args:
        texts: `comparable` texts, those to keep first.
        params: threshold, shingle length and permutations.

    Returns:
        index of the kept text by the index of each near duplicate.
    """
    shingled = [shingles(text, params.shingle) for text in texts]
    sketches = RMinHash.from_token_sets([sorted(own) for own in shingled], params.permutations, _SEED)
    index = RMinHashLSH(params.threshold, params.permutations, bands(params.permutations, params.threshold))
    found = {}
    for number, sketch in enumerate(sketches):
        candidates = sorted(index.query(sketch))
        original = next(
            (other for other in candidates if jaccard(shingled[number], shingled[other]) >= params.threshold), None
        )
        if original is None:
            index.insert(number, sketch)
        else:
            found[number] = original
    return found


def shingles(text: str, length: int) -> frozenset[str]:
    """Return all runs of `length` characters; of a shorter text itself."""
    return frozenset(text[start : start + length] for start in range(max(1, len(text) - length + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of the elements of both sets that are in each."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def bands(permutations: int, threshold: float) -> int:
    """Return the fewest bands that find nearly every pair at the threshold: 1 - (1 - threshold^rows)^bands."""
    for count in range(1, permutations + 1):
        if permutations % count == 0 and 1 - (1 - threshold ** (permutations // count)) ** count >= _RECALL:
            return count
    return permutations


class LeakIndex:
    """Texts that must not be seen before the test, and a quick way to find them in a large corpus."""

    def __init__(self, protected: Sequence[str], near: NearDuplicateParams | None):
        """Index `comparable` texts; `near` is None where near duplicates do not count."""
        self._texts = list(protected)
        self._near = near
        self._exact = {text: number for number, text in enumerate(protected)}
        self._spelled = [" ".join(words(text)) for text in protected]
        self._shingles: dict[int, frozenset[str]] = {}
        self._windows: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, text in enumerate(protected):
            for window in set(_windows(words(text))):
                self._windows[window].append(number)
        self._windows = dict(self._windows)

    def find(self, text: str) -> tuple[str, int] | None:
        """Return rule and index of the protected text that a `comparable` text gives away, or None.

        Texts of fewer than four words count only where they are equal: "who am i" gives nothing away in a novel.
        """
        if text in self._exact:
            return "leak", self._exact[text]
        tokens = words(text)
        if self._windows.keys().isdisjoint(_windows(tokens)):
            return None
        spelled = f" {' '.join(tokens)} "
        candidates = sorted({number for window in _windows(tokens) for number in self._windows.get(window, ())})
        for number in candidates:
            if f" {self._spelled[number]} " in spelled:
                return "leak", number
        return next((("near_leak", number) for number in candidates if self._is_near(text, number)), None)

    def _is_near(self, text: str, number: int) -> bool:
        other = self._texts[number]
        if self._near is None or min(len(text), len(other)) < _SHORTEST_RATIO * max(len(text), len(other)):
            return False
        if number not in self._shingles:
            self._shingles[number] = shingles(other, self._near.shingle)
        return jaccard(shingles(text, self._near.shingle), self._shingles[number]) >= self._near.threshold


def _windows(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(_WINDOW)), strict=False)

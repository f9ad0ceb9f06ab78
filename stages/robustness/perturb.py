"""Perturbations of a text: pure functions of the text, a strength from 0 (leaves it) to 1, and chance."""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.core.params import Perturbation

_LETTERS = re.compile(r"[^\W\d_]+")
_NON_SPACE = re.compile(r"\S+")
_WORD = re.compile(r"\S*\w\S*")  # no mark on its own
_WORD_AND_SPACE = re.compile(r"\S+\s*")
_SHORTEST_MISTYPED = 3
_MARKS = ".,;:!?-"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Cyrillic, and Greek where Cyrillic has none; from the confusables of Unicode Technical Standard 39.
_LOOK_ALIKES = {
    "a": "\u0430", "c": "\u0441", "d": "\u0501", "e": "\u0435", "h": "\u04bb", "i": "\u0456", "j": "\u0458",
    "o": "\u043e", "p": "\u0440", "s": "\u0455", "x": "\u0445", "y": "\u0443", "A": "\u0410", "B": "\u0412",
    "C": "\u0421", "E": "\u0415", "H": "\u041d", "I": "\u0406", "J": "\u0408", "K": "\u041a", "M": "\u041c",
    "N": "\u039d", "O": "\u041e", "P": "\u0420", "S": "\u0405", "T": "\u0422", "X": "\u0425", "Y": "\u03a5",
    "Z": "\u0396",
}  # fmt: skip
_NEGATION = re.compile(
    r"\b(?P<irregular>won|can|shan)['’]t\b|n['’]t\b|(?<=\bcan)not\b|\s+not\b|\bnot\s+|\bnever\s+", re.I
)
_IRREGULAR = {"won": "will", "can": "can", "shan": "shall"}
_AUXILIARY = re.compile(
    r"\b(?:am|is|are|was|were|do|does|did|can|could|will|would|shall|should|has|have|had|may|might|must)\b", re.I
)


@dataclass(frozen=True)
class Material:
    """What perturbations put into texts."""

    synonyms: Mapping[str, Sequence[str]]
    """By lower-case word."""
    neutral_sentences: Sequence[str]


def perturb(name: Perturbation, text: str, strength: float, material: Material, seed: int, copy: int) -> str:
    """Perturb a text; the same call gives the same text, whatever was perturbed before.

    Args:
        name: of the perturbation.
        text: to change.
        strength: from 0.0, which changes nothing, to 1.0.
        material: for synonyms and length.
        seed: of chance.
        copy: which of several; each has chance of its own.
    """
    return PERTURBATIONS[name](text, strength, random.Random(f"{seed} {name} {copy} {text}"), material)


def _typos(text: str, strength: float, chance: random.Random, _: Material) -> str:
    """One slip in some words of three letters and more; the first letter, which people rarely get wrong, stays."""

    def slip(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < _SHORTEST_MISTYPED or chance.random() >= strength:
            return word
        at = chance.randrange(1, len(word))
        before, letter, after = word[:at], word[at], word[at + 1 :]
        others = [before + after, before + letter + letter + after]
        others += [before + near + after for near in _neighbours(letter)]
        if after and after[0] != letter:
            others.append(before + after[0] + letter + after[1:])
        return chance.choice(others)

    return _LETTERS.sub(slip, text)


def _neighbours(letter: str) -> list[str]:
    """The keys left and right on an English keyboard, in the letter's case."""
    row = next((row for row in _KEYBOARD if letter.lower() in row), "")
    place = row.find(letter.lower())
    near = row[max(0, place - 1) : place] + row[place + 1 : place + 2] if row else ""
    return list(near.upper() if letter.isupper() else near)


def _cased(change: Callable[[str], str]) -> Callable[[str, float, random.Random, Material], str]:
    """A perturbation that writes some words in another case."""

    def perturbed(text: str, strength: float, chance: random.Random, _: Material) -> str:
        return _LETTERS.sub(
            lambda match: _same_word(match[0], change) if chance.random() < strength else match[0], text
        )

    return perturbed


def _random_case(text: str, strength: float, chance: random.Random, _: Material) -> str:
    return "".join(_same_word(letter, str.swapcase) if chance.random() < strength else letter for letter in text)


def _same_word(word: str, change: Callable[[str], str]) -> str:
    """Change the case where that leaves the word what it is; capital I of a dotless i, for one, is another letter."""
    changed = change(word)
    return changed if changed.casefold() == word.casefold() else word


def _punctuation_added(text: str, strength: float, chance: random.Random, _: Material) -> str:
    return _NON_SPACE.sub(
        lambda match: match[0] + chance.choice(_MARKS) if chance.random() < strength else match[0], text
    )


def _punctuation_removed(text: str, strength: float, chance: random.Random, _: Material) -> str:
    left = "".join(mark for mark in text if not (_is_mark(mark) and chance.random() < strength))
    return left if left.strip() else text


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _look_alikes(text: str, strength: float, chance: random.Random, _: Material) -> str:
    return "".join(
        _LOOK_ALIKES[letter] if letter in _LOOK_ALIKES and chance.random() < strength else letter for letter in text
    )


def _truncation(text: str, strength: float, _: random.Random, __: Material) -> str:
    words = list(_WORD.finditer(text))
    # Rounded, so that a fifth of ten words is two and not a hair less.
    kept = max(1, math.ceil(round(len(words) * (1.0 - strength), 6)))
    return text[: words[kept - 1].end()] if kept < len(words) else text


def _word_drop(text: str, strength: float, chance: random.Random, _: Material) -> str:
    words = _WORD_AND_SPACE.findall(text)
    kept = [word for word in words if chance.random() >= strength]
    if len(kept) == len(words):
        return text
    return "".join(kept or [chance.choice(words)]).rstrip()


def _synonyms(text: str, strength: float, chance: random.Random, material: Material) -> str:
    """Only small words: those with a capital are mostly names."""

    def exchange(match: re.Match[str]) -> str:
        others = material.synonyms.get(match[0])
        return chance.choice(others) if others and chance.random() < strength else match[0]

    return _LETTERS.sub(exchange, text)


def _negation(text: str, strength: float, chance: random.Random, _: Material) -> str:
    if chance.random() >= strength:
        return text
    negated = _NEGATION.search(text)
    if negated is None:
        return _AUXILIARY.sub(lambda match: f"{match[0]} not", text, count=1)
    irregular = negated["irregular"]
    stem = _IRREGULAR[irregular.lower()] if irregular else ""
    kept = stem.capitalize() if irregular and irregular[0].isupper() else stem
    return text[: negated.start()] + kept + text[negated.end() :]


def _length(text: str, strength: float, chance: random.Random, material: Material) -> str:
    return f"{text} {chance.choice(material.neutral_sentences)}" if chance.random() < strength else text


PERTURBATIONS: Mapping[Perturbation, Callable[[str, float, random.Random, Material], str]] = {
    "typos": _typos,
    "upper_case": _cased(str.upper),
    "lower_case": _cased(str.lower),
    "title_case": _cased(str.capitalize),
    "random_case": _random_case,
    "punctuation_added": _punctuation_added,
    "punctuation_removed": _punctuation_removed,
    "look_alikes": _look_alikes,
    "truncation": _truncation,
    "word_drop": _word_drop,
    "synonyms": _synonyms,
    "negation": _negation,
    "length": _length,
}
"""What each perturbation does."""

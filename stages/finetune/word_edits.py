"""Easy data augmentation (EDA; Wei & Zou, 1901.11196): four edits of a text's words, one of them in each copy.

Pure functions of the text, how strong the edit is, and chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from stages.core.params import WordEdits

Synonyms = Mapping[str, Sequence[str]]
_LETTERS = re.compile(r"[^\W\d_]+")


def edited(text: str, params: WordEdits, synonyms: Synonyms, seed: int, copy: int) -> str:
    """Edit a text in one way, drawn among those that are on and change it; the same call gives the same text.

    Args:
        text: to edit.
        params: how strong each way is; 0.0 turns it off.
        synonyms: of words, by the word in small letters.
        seed: of chance.
        copy: which of several; each has chance of its own.

    Returns:
        the text itself where nothing can change it, as with a single word that has no synonym.
    """
    chance = random.Random(f"{seed} {copy} {text}")
    ways: list[Callable[[], str]] = []
    if params.synonyms:
        ways.append(lambda: replace_by_synonyms(text, params.synonyms, synonyms, chance))
    if params.insertions:
        ways.append(lambda: insert_synonyms(text, params.insertions, synonyms, chance))
    if params.swaps:
        ways.append(lambda: swap_words(text, params.swaps, chance))
    if params.deletions:
        ways.append(lambda: delete_words(text, params.deletions, chance))
    chance.shuffle(ways)
    return next((changed for way in ways if (changed := way()) != text), text)


def replace_by_synonyms(text: str, share: float, synonyms: Synonyms, chance: random.Random) -> str:
    """Give a synonym's place to some words that have one, such a share of all words, one at least."""
    open_to_it = _with_synonyms(text, synonyms)
    chosen = chance.sample(open_to_it, min(_number(text, share), len(open_to_it)))
    for match in sorted(chosen, key=re.Match.start, reverse=True):  # from the end, so that places before it hold
        text = text[: match.start()] + chance.choice(synonyms[match[0]]) + text[match.end() :]
    return text


def insert_synonyms(text: str, share: float, synonyms: Synonyms, chance: random.Random) -> str:
    """Put synonyms of random words at random places, such a share of the words in number, one at least."""
    sources, words = _with_synonyms(text, synonyms), text.split()
    if not sources:
        return text
    for _ in range(_number(text, share)):
        words.insert(chance.randint(0, len(words)), chance.choice(synonyms[chance.choice(sources)[0]]))
    return " ".join(words)


def swap_words(text: str, share: float, chance: random.Random) -> str:
    """Let two random words change places, as often as is such a share of the words, once at least."""
    words = text.split()
    if len(words) < 2:
        return text
    for _ in range(_number(text, share)):
        one, other = chance.sample(range(len(words)), 2)
        words[one], words[other] = words[other], words[one]
    return " ".join(words)


def delete_words(text: str, share: float, chance: random.Random) -> str:
    """Leave each word out with such a chance; one always stays."""
    words = text.split()
    kept = [word for word in words if chance.random() >= share]
    return " ".join(kept or [chance.choice(words)]) if words else text


def _number(text: str, share: float) -> int:
    return max(1, int(share * len(text.split())))


def _with_synonyms(text: str, synonyms: Synonyms) -> list[re.Match[str]]:
    """Words that have synonyms, no stop words: those are often spelled like another word, as "in" like the inch.

    Only small ones: words with a capital are mostly names.
    """
    return [match for match in _LETTERS.finditer(text) if match[0] not in ENGLISH_STOP_WORDS and synonyms.get(match[0])]

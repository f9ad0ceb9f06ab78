"""Words that mean the same, out of Princeton's WordNet (Miller 1995) or a file of groups.

A word has many senses and a text says one of them, so most pairs of "synonyms" would change what a text says. Out of
WordNet a pair is taken only where both words mostly mean the same thing: more than half of the uses of each in the
texts that Princeton tagged by hand are of one sense, which both share. Words never met there are too rare to be used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from stages.core.errors import UserError
from stages.core.tables import decode, read_bytes

_PARTS_OF_SPEECH = {"n": "1", "v": "2", "a": "3", "r": "4", "s": "5"}
"""Of a sense, as the files of synsets and as index.sense write it."""
_ENTRY = re.compile(r"(\d{8}) \d\d ([nvasr]) ([0-9a-f]{2}) (.+)")
_WORD = re.compile(r"[a-z]{3,}")


def read_lexicon(files: Mapping[str, Path], format: Literal["wordnet", "groups"], where: str) -> dict[str, list[str]]:
    """Read the synonyms of each word, words and synonyms sorted.

    Args:
        files: by their names in the source.
        format: of all of them.
        where: name of the param, for messages.

    Raises:
        UserError: if the files are not what the format says, or no two words mean the same.
    """
    texts = {name: decode(read_bytes(path), "utf-8", f"{where}: {name}") for name, path in _wanted(files, format)}
    groups = _wordnet_groups(texts, where) if format == "wordnet" else _written_groups(texts)
    synonyms: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for word in group:
            synonyms[word] |= group - {word}
    found = {word: sorted(others) for word, others in sorted(synonyms.items()) if others}
    if not found:
        raise UserError(f"{where}: no two words mean the same; write lines such as `big, large`")
    return found


def _wanted(files: Mapping[str, Path], format: str) -> list[tuple[str, Path]]:
    if format == "groups":
        return list(files.items())
    names = [(name, PurePosixPath(name).name) for name in files]
    return [(name, files[name]) for name, last in names if last.startswith("data.") or last == "index.sense"]


def _written_groups(texts: Mapping[str, str]) -> list[set[str]]:
    lines = [line for text in texts.values() for line in text.splitlines()]
    return [{word.strip().lower() for word in line.split(",") if word.strip()} for line in lines]


def _wordnet_groups(texts: Mapping[str, str], where: str) -> list[set[str]]:
    """Words by the sense that is the usual one of each."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # takes a second to import

    senses = [text for name, text in texts.items() if PurePosixPath(name).name == "index.sense"]
    synsets = _synsets(text for name, text in texts.items() if PurePosixPath(name).name != "index.sense")
    if not senses or not synsets:
        raise UserError(f"{where}: WordNet needs index.sense and data.noun, data.verb, data.adj, data.adv")
    usual = _usual_senses(senses[0])
    groups = []
    for sense, words in synsets.items():
        # As written: a name in capitals, such as WHO, is not the small word.
        fitting = {word for word in words if _WORD.fullmatch(word) and usual.get(word) == sense}
        groups.append(fitting - ENGLISH_STOP_WORDS)
    return groups


def _synsets(texts: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Words of each sense, by part of speech and offset; wndb(5WN) tells the form of a line."""
    found = {}
    for text in texts:
        for line in text.splitlines():
            match = _ENTRY.match(line)
            if match:
                offset, part, count, rest = match.groups()
                found[_PARTS_OF_SPEECH[part], offset] = rest.split(" ")[: 2 * int(count, 16) : 2]
    return found


def _usual_senses(index: str) -> dict[str, tuple[str, str]]:
    """The sense that a word mostly has, by the tagged uses in the last column of index.sense (senseidx(5WN))."""
    uses: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for line in index.splitlines():
        key, offset, _, tagged = line.split()
        word, _, about = key.partition("%")
        uses[word][about[0], offset] = int(tagged)
    usual = {}
    for word, counts in uses.items():
        sense, most = counts.most_common(1)[0]
        if 2 * most > counts.total():
            usual[word] = sense
    return usual

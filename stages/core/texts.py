"""When two texts count as the same: the one definition that splitting, deduplication and leak detection share."""

from __future__ import annotations

import re
import unicodedata

# Apostrophes, quotes and spaces differ between copies of one text; letters, digits, emoji and currency signs do not.
_IGNORED_CATEGORIES = {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sk", "Zl", "Zp", "Zs", "Cc", "Cf"}

# Scripts written without spaces count character by character.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|"
                   r"[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")  # fmt: skip


class _Ignored(dict[int, str]):
    """A translation table that fills itself: ignored characters become spaces, the rest stays."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character) in _IGNORED_CATEGORIES else character
        return self[code]


_TABLE = _Ignored()


def comparable(text: str) -> str:
    """Return what is left of a text without case, punctuation and spacing; equal for texts that count as the same.

    A text of punctuation alone, such as ":)", keeps it.
    """
    return " ".join(text.casefold().translate(_TABLE).split()) or "".join(text.split())


def words(text: str) -> list[str]:
    """Cut a `comparable` text into words; Chinese, Japanese, Thai and Lao into characters."""
    return text.split() if text.isascii() else _WORD.findall(text)

"""Cleaning of the corpus: a quarter of a million texts in seconds, so every common case is decided early."""

from __future__ import annotations

from collections.abc import Sequence

from stages.clean.duplicates import LeakIndex
from stages.clean.ledger import CORPUS, Ledger
from stages.clean.rules import repair, repairs
from stages.core.observe.progress import track
from stages.core.params import CleanParams
from stages.core.texts import comparable


def clean_corpus(texts: Sequence[str], protected: Sequence[str], params: CleanParams, ledger: Ledger) -> list[str]:
    """Repair and sift the corpus; whatever is removed goes to the ledger.

    Args:
        texts: of the corpus.
        protected: cleaned texts of test and validation, which the corpus must not hold.
        params: which rules, and how strict.
        ledger: notes repairs and rejects.

    Returns:
        the texts that stay, in their first order.
    """
    rules = repairs(params)
    leaks = LeakIndex([comparable(text) for text in protected], params.near_duplicates)
    kept: dict[str, str] = {}

    def note(rule: str, before: str, after: str) -> None:
        ledger.repaired(rule, CORPUS, before, after)

    def reject(rule: str, text: str, detail: str) -> None:
        ledger.rejected(rule, CORPUS, text, None, detail)

    for original in track(texts, "clean corpus"):
        text = repair(original, rules, note)
        if len(text) < params.corpus_minimum_characters:
            shortest = f"{len(text)} characters, at least {params.corpus_minimum_characters} wanted"
            reject("too_short" if text else "empty", original, shortest)
            continue
        key = comparable(text)
        if key in kept:
            reject("duplicate", original, kept[key])
            continue
        leak = leaks.find(key)
        if leak is not None:
            rule, number = leak
            reject(rule, original, protected[number])
            continue
        kept[key] = text
    return list(kept.values())

"""Cleaning of the other domains, lightly: they are judged as they are, once what would fool the judge is gone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas

from stages.clean.ledger import SHIFTED, Ledger
from stages.clean.rules import repair, repairs
from stages.core.params import CleanParams
from stages.core.tables import frame_of
from stages.core.texts import comparable


def clean_shifted(
    frame: pandas.DataFrame, splits: Mapping[str, pandas.DataFrame], params: CleanParams, ledger: Ledger
) -> pandas.DataFrame:
    """Repair the texts as the task's own are; remove copies, what the task has too, and what is too short or long.

    Args:
        frame: domain, text and label.
        splits: cleaned splits of the task; whatever they hold is no news to the model.
        params: which rules, and how strict.
        ledger: notes repairs and rejects.

    Returns:
        domain, text and label of the rows that stay, in their first order.
    """
    rules = repairs(params)
    own = {comparable(text): text for split in splits.values() for text in split["text"]}
    seen: dict[tuple[str, str], str] = {}
    kept = []

    def note(rule: str, before: str, after: str) -> None:
        ledger.repaired(rule, SHIFTED, before, after)

    for domain, original, label in frame[["domain", "text", "label"]].itertuples(index=False):
        text = repair(original, rules, note)
        key = comparable(text)
        length = f"{len(text)} characters, {params.minimum_characters} to {params.maximum_characters} wanted"
        if not text:
            ledger.rejected("empty", SHIFTED, original, label, "nothing is left of the text")
        elif len(text) < params.minimum_characters:
            ledger.rejected("too_short", SHIFTED, original, label, length)
        elif len(text) > params.maximum_characters:
            ledger.rejected("too_long", SHIFTED, original, label, length)
        elif key in own:
            ledger.rejected("leak", SHIFTED, original, label, own[key])
        elif (domain, key) in seen:
            ledger.rejected("duplicate", SHIFTED, original, label, seen[domain, key])
        else:
            seen[domain, key] = text
            kept.append([domain, text, label])
    return frame_of(["domain", "text", "label"], kept)

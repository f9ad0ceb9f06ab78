"""The account of a cleaning: what was repaired, what was removed, and examples of each."""

from __future__ import annotations

from collections import Counter

import pandas

from stages.core.tables import frame_of

REPAIRS = ("unicode", "html", "control_characters", "whitespace")
RELABELLED = "relabelled"
REMOVALS = (
    "dropped", "empty", "too_short", "too_long", "label_conflict", "duplicate", "leak", "near_duplicate", "near_leak",
)  # fmt: skip
CORPUS = "corpus"
CORPUS_REMOVALS = ("empty", "too_short", "duplicate", "leak", "near_leak")
SHIFTED = "shifted"
SHIFTED_REMOVALS = ("empty", "too_short", "too_long", "duplicate", "leak")
_LONGEST_EXAMPLE = 160
_LONGEST_DETAIL = 300
_BEFORE_A_DIFFERENCE = 40
_CORRECTION = ("split", "key", "text", "before", "after", "reviewer", "note", "file", "sha256")


class Ledger:
    """Counts per rule and split with the first example of each, and all rejects."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], tuple[str, str]] = {}
        self._rejects: list[tuple[str, str | None, str, str, str]] = []
        self._corrections: list[dict[str, str]] = []

    def repaired(self, rule: str, split: str, before: str, after: str) -> None:
        """Note that a repair changed a text."""
        self._counts[rule, split] += 1
        if (rule, split) not in self._examples:
            self._examples[rule, split] = _around_difference(before, after)

    def rejected(self, rule: str, split: str, text: str, label: str | None, detail: str) -> None:
        """Note that a text, given as it came, was removed; `detail` says what it collided with or how it failed."""
        detail = _cut(detail, _LONGEST_DETAIL)
        self._counts[rule, split] += 1
        self._examples.setdefault((rule, split), (_cut(text, _LONGEST_EXAMPLE), _cut(detail, _LONGEST_EXAMPLE)))
        self._rejects.append((text, label, split, rule, detail))

    def corrected(self, split: str, **entry: str) -> None:
        """Note what a reviewer changed: key, text, before, after, reviewer, note, file and its sha256."""
        self._corrections.append({"split": split, **entry})

    def relabelled(self, split: str, text: str, before: str, after: str) -> None:
        """Note that a text got another label."""
        self._counts[RELABELLED, split] += 1
        self._examples.setdefault((RELABELLED, split), (_cut(text, _LONGEST_EXAMPLE), f"{before} -> {after}"))

    def corrections(self) -> pandas.DataFrame:
        """Return every row that a reviewer changed, with where that came from."""
        return frame_of(_CORRECTION, [[entry[name] for name in _CORRECTION] for entry in self._corrections])

    def rejects(self) -> pandas.DataFrame:
        """Return every removed text: text, label (none in the corpus), split, reason, detail."""
        return frame_of(["text", "label", "split", "reason", "detail"], self._rejects)

    def rules(self, splits: tuple[str, ...]) -> pandas.DataFrame:
        """Return a row for each rule and split: rule, split, count, example_before, example_after_or_detail."""
        rows = []
        for rule in (*REPAIRS, RELABELLED, *REMOVALS):
            for split in splits:
                if split == CORPUS and rule not in (*REPAIRS, *CORPUS_REMOVALS):
                    continue
                before, after = self._examples.get((rule, split), ("", ""))
                rows.append([rule, split, self._counts[rule, split], before, after])
        return frame_of(["rule", "split", "count", "example_before", "example_after_or_detail"], rows)

    def totals(self, rules: tuple[str, ...], splits: tuple[str, ...]) -> dict[str, int]:
        """Return the count of each rule over some splits."""
        return {rule: sum(self._counts[rule, split] for split in splits) for rule in rules}


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """Cut two versions of a text so that the first difference is seen."""
    same = next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - _BEFORE_A_DIFFERENCE)
    lead = "…" if start else ""
    return _cut(lead + before[start:], _LONGEST_EXAMPLE), _cut(lead + after[start:], _LONGEST_EXAMPLE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"

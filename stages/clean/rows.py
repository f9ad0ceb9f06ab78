"""A labelled text on its way through the cleaning."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """A labelled text on its way."""

    split: str
    label: str
    original: str
    """As it came."""
    text: str
    """Repaired."""
    key: str
    """`comparable` form of the repaired text."""
    others: tuple[str, ...]
    """Cells of the further columns, which travel as they are."""

    def relabelled(self, label: str) -> Row:
        """The same text under another label."""
        return replace(self, label=label)

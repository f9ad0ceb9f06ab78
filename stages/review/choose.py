"""Which texts to show, in which order, and what to say about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from stages.core.artifacts import text_sha256

FLIP = "flip"
LABEL_DOUBT = "label_doubt"
LOW_CONFIDENCE = "low_confidence"
REASONS = (FLIP, LABEL_DOUBT, LOW_CONFIDENCE)
COLUMNS = (
    "key", "split", "text", "label", "why", "reasons", "finetuned_answer", "finetuned_confidence",
    "compressed_answer", "compressed_confidence", "suggestion", "doubt", "correction", "note", "reviewer",
)  # fmt: skip
"""Of review.csv; the last three are for the reviewer."""
_DIGITS = 4


@dataclass(frozen=True)
class Answer:
    """What a model said about a text."""

    label: str
    confidence: float
    """Probability of that label."""


@dataclass(frozen=True)
class Doubt:
    """Why a label is probably wrong."""

    suggestion: str
    """The label that it seems to be."""
    likely: float
    """Probability of the suggestion, to a model that did not learn the label given."""
    given: float
    """Probability of the label given, to the same model."""

    @property
    def margin(self) -> float:
        """The larger, the more in doubt."""
        return self.likely - self.given


@dataclass(frozen=True)
class Judged:
    """A labelled text and what is known of it."""

    split: str
    text: str
    label: str
    finetuned: Answer
    compressed: Answer | None
    """None outside the test split, where the compressed model was not asked."""
    doubt: Doubt | None

    @property
    def flipped(self) -> bool:
        """Whether the compressed model answers otherwise than the fine-tuned one."""
        return self.compressed is not None and self.compressed.label != self.finetuned.label

    def reasons(self, low_confidence: float) -> Iterator[tuple[str, float, str]]:
        """Yield each reason to look at the text: its name, how strong it is (larger first), and a sentence."""
        if self.compressed is not None and self.flipped:
            both = min(self.finetuned.confidence, self.compressed.confidence)
            answers = f"{_told(self.finetuned)}, the compressed one {_told(self.compressed)}"
            yield FLIP, both, f"The fine-tuned model answers {answers}."
        if self.doubt is not None:
            doubt = self.doubt
            told = f"{doubt.suggestion} is {doubt.likely:.0%} likely, {self.label} {doubt.given:.0%}"
            yield LABEL_DOUBT, doubt.margin, f"The label is in doubt: to a model that did not learn it, {told}."
        if self.compressed is not None and self.compressed.confidence < low_confidence:
            yield (
                LOW_CONFIDENCE,
                -self.compressed.confidence,
                f"The compressed model is unsure: {_told(self.compressed)}.",
            )


@dataclass(frozen=True)
class Chosen:
    """A text for the reviewer."""

    judged: Judged
    reasons: Mapping[str, str]
    """Sentence by name of the reason."""

    def row(self) -> list[str]:
        """Cells in the order of `COLUMNS`; the key is the SHA-256 of the text."""
        judged, compressed, doubt = self.judged, self.judged.compressed, self.judged.doubt
        return [
            text_sha256(judged.text),
            judged.split,
            judged.text,
            judged.label,
            " ".join(self.reasons.values()),
            " ".join(self.reasons),
            judged.finetuned.label,
            _number(judged.finetuned.confidence),
            compressed.label if compressed else "",
            _number(compressed.confidence) if compressed else "",
            doubt.suggestion if doubt else "",
            _number(doubt.margin) if doubt else "",
            *("", "", ""),
        ]


def choose(texts: Sequence[Judged], count: int, low_confidence: float) -> list[Chosen]:
    """Take the strongest of each reason in turns, so that no reason crowds out another, until `count` are found."""
    ranked: dict[str, list[tuple[float, int]]] = {reason: [] for reason in REASONS}
    told: dict[int, dict[str, str]] = {}
    for index, text in enumerate(texts):
        for reason, strength, sentence in text.reasons(low_confidence):
            ranked[reason].append((-strength, index))
            told.setdefault(index, {})[reason] = sentence
    turns = zip_longest(*(sorted(found) for found in ranked.values()))
    order = dict.fromkeys(entry[1] for turn in turns for entry in turn if entry is not None)
    return [Chosen(texts[index], told[index]) for index in list(order)[:count]]


def count_reasons(chosen: Sequence[Chosen]) -> dict[str, int]:
    """Count the texts that have each reason; one may have several."""
    return {reason: sum(reason in entry.reasons for entry in chosen) for reason in REASONS}


def _told(answer: Answer) -> str:
    return f"{answer.label} ({answer.confidence:.0%})"


def _number(value: float) -> str:
    return f"{value:.{_DIGITS}f}"

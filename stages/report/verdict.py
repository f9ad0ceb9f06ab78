"""The verdict, which stands first: what was gained, what it cost, and what the test could not have shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.core.ladder import LadderRow, fastest_within_floor, headline, points, times, times_smaller


@dataclass(frozen=True)
class Statement:
    """One fact of the verdict: a figure, what it means, and the interval around it where there is one."""

    figure: str
    meaning: str
    interval: str


@dataclass(frozen=True)
class Verdict:
    """The answer of the whole pipeline."""

    answer: str
    """In as few words as will do."""
    lead: str
    """The same in one sentence with its figures."""
    statements: list[Statement]
    floor: str
    """Whether the floor is met, and how surely."""
    sure: bool | None
    """True where the whole interval is above the floor, False where only the estimate is, None where nothing is."""
    unseen: str | None
    """What the test could not have shown; None where there is no model to speak of."""


def reach_verdict(rows: Sequence[LadderRow], floor: float) -> Verdict:
    """Say what the ladder came to.

    Args:
        rows: of the ladder.
        floor: how much quality a model may lose, as a share.
    """
    best = fastest_within_floor(rows)
    if best is None:
        lost = f"Every model lost more than the {100 * floor:.1f} points that params.yaml allows."
        return Verdict("No model meets the quality floor", headline(rows), [], lost, None, None)
    return Verdict(
        answer=_answer(best, rows),
        lead=headline(rows),
        statements=_statements(best, rows),
        floor=_floor(best, floor),
        sure=best.low is None or best.low >= -floor,
        unseen=_unseen(best, floor),
    )


def _answer(best: LadderRow, rows: Sequence[LadderRow]) -> str:
    size = times_smaller(best, rows)
    smaller = f" and {times(size)} smaller" if size > 1.0 else ""
    faster = f"{times(best.over_fair.median)} as fast{smaller}"
    if best.difference is None or best.difference >= -0.0005:
        return f"{faster}, at no loss of {_metric(best)}"
    return f"{faster}, for {-100 * best.difference:.1f} points of {_metric(best)}"


def _statements(best: LadderRow, rows: Sequence[LadderRow]) -> list[Statement]:
    fair, naive = best.over_fair, best.over_naive
    found = [
        Statement(times(fair.median), "the throughput of fair PyTorch", f"{_span(times, fair.low, fair.high)}, rounds"),
        Statement(
            times(naive.median), "the throughput of naive PyTorch", f"{_span(times, naive.low, naive.high)}, rounds"
        ),
    ]
    if best.difference is not None and best.low is not None and best.high is not None:
        interval = f"{_span(points, best.low, best.high)}, {best.confidence:.0%} interval"
        found.append(Statement(points(best.difference), f"points of {_metric(best)}", interval))
    return [*found, Statement(times(times_smaller(best, rows)), "smaller on disk", "exact")]


def _span(write: Callable[[float], str], low: float, high: float) -> str:
    return f"{write(low)} to {write(high)}"


def _floor(best: LadderRow, floor: float) -> str:
    allowed = f"the floor of {points(-floor)} points"
    if best.low is None or best.low >= -floor:
        return f"Meets {allowed}, and so does its whole interval."
    return (
        f"Meets {allowed} by its estimate. Its interval reaches down to {points(best.low)}, "
        "so a larger loss is not ruled out."
    )


def _unseen(best: LadderRow, floor: float) -> str | None:
    if best.detectable is None:
        return None
    if best.low == best.high:
        return "No test text tells the two models apart, so nothing can be said about differences on other texts."
    fine = "finer than" if best.detectable <= floor else "coarser than"
    return (
        f"A true difference below {100 * best.detectable:.1f} points of accuracy would have gone unseen more often "
        f"than one time in five; that is {fine} the floor of {100 * floor:.1f}."
    )


def _metric(row: LadderRow) -> str:
    return row.metric.replace("_", " ")

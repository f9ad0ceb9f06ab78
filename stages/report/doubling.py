"""How fast champions get faster: a straight line through the logarithm of their speed over time (Moore 1965)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from scipy import stats

FEWEST_DAYS = 3
"""A line through two points has no error to tell."""


@dataclass(frozen=True)
class Doubling:
    """A fitted doubling time, in days; a negative one is the time in which speed halves."""

    days: float
    """Infinite where speed did not change."""
    low: float | None
    """Ends of the interval; None for both where it is open: speed may as well not have grown at all."""
    high: float | None
    confidence: float
    slope: float
    """Doublings a day."""
    intercept: float
    """Binary logarithm of the speed on the first day."""
    points: int

    def speed(self, days: float) -> float:
        """Fitted speed so many days after the first."""
        return float(2.0 ** (self.intercept + self.slope * days))


def fit_doubling(days: Sequence[date], speeds: Sequence[float], confidence: float) -> Doubling | None:
    """Fit log2(speed) = intercept + slope x days by least squares; the doubling time is 1 / slope.

    The interval of the slope is Student's t with n - 2 degrees of freedom; its ends, inverted, are those of the
    doubling time, which is bounded only where the interval of the slope excludes zero.

    Args:
        days: of the champions, in any order.
        speeds: texts a second, positive.
        confidence: of the interval, such as 0.95.

    Returns:
        the fit; None where there are fewer than three different days.
    """
    if len(set(days)) < FEWEST_DAYS:
        return None
    first = min(days)
    line = stats.linregress([(day - first).days for day in days], [math.log2(speed) for speed in speeds])
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(days) - 2) * line.stderr)
    slope = float(line.slope)
    bounded = abs(slope) > reach
    ends = sorted((1.0 / (slope - reach), 1.0 / (slope + reach))) if bounded else (None, None)
    return Doubling(
        days=1.0 / slope if slope else math.inf,
        low=ends[0],
        high=ends[1],
        confidence=confidence,
        slope=slope,
        intercept=float(line.intercept),
        points=len(days),
    )

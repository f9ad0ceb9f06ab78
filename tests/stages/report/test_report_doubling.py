from __future__ import annotations

from datetime import date, timedelta

import numpy
import pytest
from scipy import stats

from stages.report.doubling import fit_doubling

START = date(2026, 1, 1)


def after(*days: int) -> list[date]:
    return [START + timedelta(days=day) for day in days]


def test_speed_that_doubles_every_180_days() -> None:
    days = (0, 45, 180, 400)
    fit = fit_doubling(after(*days), [1000 * 2 ** (day / 180) for day in days], 0.95)
    assert fit is not None
    assert fit.days == pytest.approx(180)
    assert (fit.low, fit.high) == (pytest.approx(180), pytest.approx(180))
    assert fit.speed(360) == pytest.approx(4000)


def test_the_line_and_its_interval_are_those_of_scipy() -> None:
    random = numpy.random.default_rng(3)
    days = sorted(int(day) for day in random.choice(700, 12, replace=False))
    speeds = [float(2 ** (9 + day / 200 + random.normal(0, 0.3))) for day in days]
    fit = fit_doubling(after(*days), speeds, 0.9)
    assert fit is not None
    line = stats.linregress([day - days[0] for day in days], numpy.log2(speeds))
    reach = stats.t.ppf(0.95, 10) * line.stderr
    assert fit.slope == pytest.approx(line.slope, rel=1e-9)
    assert (fit.low, fit.high) == (
        pytest.approx(1 / (line.slope + reach), rel=1e-9),
        pytest.approx(1 / (line.slope - reach), rel=1e-9),
    )


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = numpy.random.default_rng(11)
    days, covered = (0, 60, 130, 200, 290, 365), 0
    for _ in range(600):
        speeds = [float(2 ** (9 + day / 180 + random.normal(0, 0.1))) for day in days]
        fit = fit_doubling(after(*days), speeds, 0.95)
        assert fit is not None and fit.low is not None and fit.high is not None
        covered += fit.low <= 180 <= fit.high
    assert 0.93 <= covered / 600 <= 0.97


def test_speed_that_halves_has_a_negative_doubling_time() -> None:
    fit = fit_doubling(after(0, 90, 180), [4000, 2000, 1000], 0.95)
    assert fit is not None
    assert fit.days == pytest.approx(-90)


def test_growth_that_may_be_none_has_no_bounds() -> None:
    fit = fit_doubling(after(0, 10, 20, 30), [1000, 1400, 900, 1100], 0.95)
    assert fit is not None
    assert (fit.low, fit.high) == (None, None)
    still = fit_doubling(after(0, 10, 20), [1000, 1000, 1000], 0.95)
    assert still is not None and still.days == float("inf")


def test_two_days_are_too_few() -> None:
    assert fit_doubling(after(0, 30, 30), [1.0, 2.0, 2.1], 0.95) is None
    assert fit_doubling([], [], 0.95) is None

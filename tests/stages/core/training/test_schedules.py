"""Schedules worked by hand, held against those of transformers, and by what must hold for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from stages.core.params import Schedule, ScheduleParams, StableScheduleParams
from stages.core.training.schedules import rate_share

SIMPLE = ("linear", "cosine", "constant")


def schedule(kind: str, warmup: float, decay: float = 0.2) -> Schedule:
    if kind == "warmup_stable_decay":
        return StableScheduleParams(kind="warmup_stable_decay", warmup=warmup, decay=decay)
    return ScheduleParams.model_validate({"kind": kind, "warmup": warmup})


def shares(given: Schedule, steps: int) -> list[float]:
    return [rate_share(given, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("linear", [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1.0, 1.0, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("warmup_stable_decay", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4]),
    ],
)
def test_ten_steps_by_hand(kind: str, expected: list[float]) -> None:
    assert shares(schedule(kind, 0.2, 0.4), 10) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps", [7, 40, 111])
@pytest.mark.parametrize("warmup", [0.1, 0.35])
def test_they_are_those_of_transformers_but_that_no_step_is_wasted(warmup: float, steps: int) -> None:
    rising, falling = max(1, round(warmup * steps)), round(0.2 * steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    references: dict[str, Any] = {
        "linear": get_linear_schedule_with_warmup(optimizer, rising, steps),
        "cosine": get_cosine_schedule_with_warmup(optimizer, rising, steps),
        "constant": get_constant_schedule_with_warmup(optimizer, rising),
        "warmup_stable_decay": get_wsd_schedule(optimizer, rising, falling, steps, decay_type="linear"),
    }
    for kind, reference in references.items():
        # Theirs begins with a step at a rate of nothing; here the warm-up is one step ahead.
        expected = [reference.lr_lambdas[0](step + 1 if step < rising else step) for step in range(steps)]
        assert shares(schedule(kind, warmup), steps) == pytest.approx(expected), kind


@given(
    kind=st.sampled_from([*SIMPLE, "warmup_stable_decay"]),
    warmup=st.floats(0.0, 0.5),
    decay=st.floats(0.01, 0.5),
    steps=st.integers(1, 300),
)
def test_every_step_counts_and_the_rate_rises_once_and_falls_once(
    kind: str, warmup: float, decay: float, steps: int
) -> None:
    found = shares(schedule(kind, warmup, decay), steps)
    top = found.index(max(found))
    assert all(0.0 < share <= 1.0 for share in found)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if kind == "constant":
        assert found[-1] == 1.0


def test_a_rise_and_a_fall_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup and decay must not exceed 1 together"):
        schedule("warmup_stable_decay", 0.5, 0.6)

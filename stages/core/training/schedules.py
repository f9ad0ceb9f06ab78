"""How the learning rate changes over a training run."""

from __future__ import annotations

from stages.core.params import ScheduleParams


def rate_share(schedule: ScheduleParams, step: int, steps: int) -> float:
    """Share of the learning rate at a step, 0 to 1: a linear warm-up, then the decay of the schedule's kind.

    Args:
        schedule: its kind and the share of the steps that it warms up.
        step: counted from 0.
        steps: of the whole run.
    """
    warmup = max(1, round(schedule.warmup * steps))
    rise, fall = (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
    return max(0.0, min(1.0, rise, fall))

"""How the learning rate changes over a training run."""

from __future__ import annotations

import math

from stages.core.params import Schedule


def rate_share(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the learning rate at a step, 0 to 1: a linear warm-up, then the course of the schedule's kind.

    The first step already has a share of the rate, and the last one still has: none is wasted on a rate of nothing.

    Args:
        schedule: its kind, the share of the steps that it warms up, and for some the share at the end that it decays.
        step: counted from 0.
        steps: of the whole run.
    """
    warmup = max(1, round(schedule.warmup * steps))
    rise, fall = (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
    match schedule.kind:
        case "linear":
            course = fall
        case "cosine":
            course = 0.5 - 0.5 * math.cos(math.pi * min(1.0, fall))
        case "constant":
            course = 1.0
        case "warmup_stable_decay":
            course = (steps - step) / max(1, round(schedule.decay * steps))
    return max(0.0, min(1.0, rise, course))

"""From what the runs told to rows, ratios and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from benchmarks.training.arithmetic import Arithmetic
from benchmarks.training.contenders import TARGET_FINETUNE, TARGET_PRETRAIN, Contender
from benchmarks.training.settings import SHARED, WARM_UP_STEPS
from stages.core.timing import ratios

Run = Mapping[str, Any]
Curve = Sequence[tuple[int, float, float]]


@dataclass(frozen=True)
class PretrainRow:
    """A contender's pretraining runs, a number a round each."""

    contender: Contender
    tokens_per_second: tuple[float, ...]
    padding: float
    """Share of the computed positions that held no token of a text."""
    tokens_per_step: float
    heldout: Mapping[int, float]
    """Loss at the end by round, of the runs that were not stopped early."""
    blocks: Mapping[int, float]
    """The same with the held-out texts joined to blocks."""
    ceiling: tuple[float, ...]
    """Share of the ceiling of large square products that the needed operations make up."""
    shapes_ceiling: tuple[float, ...]
    """The same of what products of the model's own shapes reach."""
    memory_mb: tuple[float, ...]
    imports_mb: tuple[float, ...]


@dataclass(frozen=True)
class FinetuneRow:
    """A contender's fine-tuning runs, a value a seed each."""

    contender: Contender
    accuracy: float
    """Asked for."""
    curves: tuple[Curve, ...]
    """A seed each: step, seconds of training and accuracy, of each judgement."""
    process_seconds: tuple[float, ...]
    """From the start of the process, imports and evaluations included."""
    tokens_per_second: tuple[float, ...]
    padding: float
    memory_mb: tuple[float, ...]

    def seconds(self, without: int | None = None) -> float | None:
        """Seconds until the mean curve of the seeds, or of all but one, reaches the accuracy; None if it never does."""
        chosen = [curve for number, curve in enumerate(self.curves) if number != without]
        return seconds_to(mean_curve(chosen), self.accuracy)


@dataclass(frozen=True)
class Target:
    """Something the engine must reach."""

    what: str
    wanted: str
    ratio: Mapping[str, float]
    """`median`, `low` and `high` over the rounds."""
    met: bool


def tokens_per_second(run: Run) -> float:
    """Tokens of texts trained a second, after the steps that warm up."""
    first = min(WARM_UP_STEPS, len(run["seconds"]) - 1) - 1
    tokens = run["tokens"][-1] - (run["tokens"][first] if first >= 0 else 0)
    seconds = run["seconds"][-1] - (run["seconds"][first] if first >= 0 else 0.0)
    return float(tokens / seconds)


def tokens_per_step(run: Run) -> float:
    """Tokens of texts in a step, its mean after the first one, to which a compiler's trials count."""
    return float(numpy.mean(numpy.diff(run["tokens"])))


def padding(run: Run) -> float:
    """Share of the computed positions that held no token of a text: padding and special tokens."""
    return 1.0 - float(run["tokens"][-1] / run["positions"][-1])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds of seconds and accuracy at each step that all were judged at.

    One curve jumps by a point from judgement to judgement, so that where it first crosses a line is mostly chance.
    """
    shared = [step for step, _, _ in curves[0] if all(step in {each[0] for each in curve} for curve in curves)]
    found = [{step: (seconds, value) for step, seconds, value in curve} for curve in curves]
    means = [numpy.mean([curve[step] for curve in found], axis=0) for step in shared]
    return [(step, float(seconds), float(value)) for step, (seconds, value) in zip(shared, means, strict=True)]


def seconds_to(curve: Curve, accuracy: float) -> float | None:
    """Seconds at which a curve first reaches an accuracy, on a straight line from the judgement before."""
    before, worse = 0.0, 0.0
    for _, seconds, value in curve:
        if value >= accuracy:
            return before + (seconds - before) * (accuracy - worse) / (value - worse)
        before, worse = seconds, value
    return None


def pretrain_row(contender: Contender, runs: Sequence[Run], result: Mapping[str, Any]) -> PretrainRow:
    """Sum up a contender's pretraining runs; `result` has `facts` and `ceilings`, one a round."""
    facts = result["facts"]["pretrain"]
    needed = Arithmetic(**facts["arithmetic"]).operations_per_token(SHARED.mask_probability, facts["context"])
    speeds = tuple(tokens_per_second(run) for run in runs)
    whole = {number: run for number, run in enumerate(runs) if "blocks_loss" in run}
    ceilings = result["ceilings"]
    return PretrainRow(
        contender,
        speeds,
        float(numpy.median([padding(run) for run in runs])),
        float(numpy.median([tokens_per_step(run) for run in runs])),
        {number: float(run["curve"][-1][2]) for number, run in whole.items()},
        {number: float(run["blocks_loss"]) for number, run in whole.items()},
        _shares(speeds, needed, [each["square"] for each in ceilings]),
        _shares(speeds, needed, [each["shapes"] for each in ceilings]),
        tuple(run["peak_memory_mb"] for run in runs),
        tuple(run["imports_memory_mb"] for run in runs),
    )


def _shares(speeds: Sequence[float], needed: float, ceilings: Sequence[float]) -> tuple[float, ...]:
    return tuple(speed * needed / (ceiling * 1e9) for speed, ceiling in zip(speeds, ceilings, strict=True))


def finetune_row(contender: Contender, runs: Sequence[Run], accuracy: float) -> FinetuneRow:
    """Sum up a contender's fine-tuning runs."""
    return FinetuneRow(
        contender,
        accuracy,
        tuple(run["curve"] for run in runs),
        tuple(run["process_seconds"] for run in runs),
        tuple(tokens_per_second(run) for run in runs),
        float(numpy.median([padding(run) for run in runs])),
        tuple(run["peak_memory_mb"] for run in runs),
    )


def loss_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, float] | None:
    """Our loss less theirs, round by round, the same seed each: `mean`, `low`, `high`, and our own `spread`.

    `spread` is how far our rounds lie apart: what a seed alone does. None where no round has both.
    """
    differences = [ours[number] - theirs[number] for number in ours if number in theirs]
    if not differences:
        return None
    spread = max(ours.values()) - min(ours.values())
    return {
        "mean": float(numpy.mean(differences)),
        "low": min(differences),
        "high": max(differences),
        "spread": spread,
    }


def no_worse(difference: Mapping[str, float]) -> bool:
    """Whether a loss is no higher than another but for what a seed alone does."""
    return difference["mean"] <= difference["spread"]


def reached_ratio(ours: FinetuneRow, theirs: FinetuneRow) -> dict[str, float] | None:
    """How many times sooner our mean curve reaches the accuracy; None where one never does.

    `low` and `high` are what leaving out one seed at a time makes of it: 0 where we do not get there then, and
    infinite where they do not.
    """
    mine, other = ours.seconds(), theirs.seconds()
    if mine is None or other is None:
        return None
    numbers = range(len(ours.curves)) if len(ours.curves) > 1 else ()
    pairs = [(ours.seconds(number) or math.inf, theirs.seconds(number) or math.inf) for number in numbers]
    found = [0.0 if faster == math.inf else slower / faster for faster, slower in pairs]
    ratio = other / mine
    return {"median": ratio, "low": min([ratio, *found]), "high": max([ratio, *found])}


def targets(pretrain: Sequence[PretrainRow], finetune: Sequence[FinetuneRow]) -> list[Target]:
    """What the engine must reach, as far as it was measured; the peers that the targets name come first."""
    found: list[Target] = []
    mine = next((row for row in pretrain if row.contender.headroom), None)
    others = _named_first([row for row in pretrain if not row.contender.headroom], TARGET_PRETRAIN)
    if mine:
        for row in others:
            ratio = ratios(mine.tokens_per_second, row.tokens_per_second)
            what = f"pretraining, tokens a second against {row.contender.title}"
            difference = loss_difference(mine.heldout, row.heldout)
            wanted = "2.5 x at a held-out loss no higher" if difference else "2.5 x; no loss was told"
            met = ratio["median"] >= 2.5 and (difference is None or no_worse(difference))
            found.append(Target(what, wanted, ratio, met))
    own = next((row for row in finetune if row.contender.headroom), None)
    for other in _named_first([row for row in finetune if not row.contender.headroom], TARGET_FINETUNE):
        sooner = reached_ratio(own, other) if own else None
        if sooner:
            what = f"fine-tuning, time to the same accuracy against {other.contender.title}"
            found.append(Target(what, "2.5 x", sooner, sooner["median"] >= 2.5))
    if mine:
        share = ratios(mine.ceiling, [1.0] * len(mine.ceiling))
        found.append(Target("pretraining, share of the bf16 ceiling", "0.40", share, share["median"] >= 0.4))
        for row in others:
            memory = ratios(mine.memory_mb, row.memory_mb)
            what = f"pretraining, resident memory against {row.contender.title}"
            found.append(Target(what, "at most 0.8 x", memory, memory["median"] <= 0.8))
    return found


def _named_first(rows: Sequence[Any], name: str) -> list[Any]:
    return sorted(rows, key=lambda row: row.contender.name != name)

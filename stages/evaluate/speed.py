"""How fast the exported model answers on each runtime, beside both PyTorch baselines."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy

from stages.core.cascade import Exported, ExportedRuntime, open_exported, predict_exported
from stages.core.choice import Setting, open_setting
from stages.core.errors import UserError
from stages.core.hardware import thread_limit, usable_processors
from stages.core.metrics import Array
from stages.core.params import LatencyParams
from stages.core.runtimes import COMPILED, EAGER, EXACT_PRECISION, REFERENCE_RUNTIME, Goal, OpenVino, precisions
from stages.core.timing import (
    durations,
    interleave,
    interleave_latency,
    items_per_second,
    percentiles,
    ratios,
    uncollected,
)
from stages.evaluate.baselines import PyTorchService

BASELINES = ("fair", "naive")

CPU_RUNTIMES = (REFERENCE_RUNTIME, OpenVino.name, EAGER, COMPILED)
_SHORT_TEXTS = 256  # enough to rank batch sizes, which differ by more than the noise of so many
_SINGLE_TRIALS = 24
_BATCH_SIZE = 32
_TRIAL_TEXTS = 64
_PASSES = 5
_WITHIN_REACH = 1.5
"""A short trial may be off by that much; who is further behind, with many texts and with one, cannot win."""
_NAIVE_SINGLES_A_ROUND = 4


@dataclass(frozen=True)
class Contest:
    """What takes part in the measurement."""

    model: Exported
    runtimes: Sequence[str]
    """That take part."""
    candidates: Sequence[str]
    """Runtimes that take part only if a short trial shows them within reach of those."""
    services: Mapping[str, PyTorchService]
    """The baselines, `fair` and `naive`."""
    texts: Sequence[str]
    """Real texts, from which samples are drawn."""
    expected: Array
    """Labels that the reference runtime gives them, [texts]."""
    least_agreement: float
    """Share of these labels that a precision which loses something must keep to be chosen."""
    params: LatencyParams
    seed: int

    def sample(self, count: int) -> list[str]:
        """Draw texts in random order; all of them if there are fewer."""
        return random.Random(self.seed).sample(list(self.texts), min(count, len(self.texts)))


@dataclass(frozen=True)
class Sweep:
    """What was tried on a runtime before the contest."""

    latency: Setting
    """The soonest for one text."""
    throughput: Setting
    """The fastest for many."""
    best_size: int
    milliseconds: float
    """Median time of one text in the trial of `latency`."""
    speeds: dict[int, float]
    """Texts a second at each batch size."""
    agreement: dict[str, float]
    """Share of labels kept by each precision that loses something, whether it may be chosen or not."""


Latencies = dict[str, list[list[float]]]
"""Milliseconds of one text at a time by contender, one list a round."""


def measure_speed(contest: Contest) -> tuple[dict[str, Any], dict[Goal, Setting], Latencies]:
    """Measure throughput and latency of every runtime and both baselines.

    Returns:
        `runtimes`, `left_out`, `best`, `baselines` and `speedup` of the stage's metrics, without memory; the settings
        that won, for latency and for throughput; and all latencies.
    """
    swept = {name: sweep_runtime(contest, name) for name in contest.runtimes}
    left_out = {name: {"reason": reason} for name in contest.candidates if (reason := far_behind(contest, name, swept))}
    for name in contest.candidates:
        if name not in left_out:
            swept[name] = sweep_runtime(contest, name)
    throughput = _throughput(contest, {name: sweep.throughput for name, sweep in swept.items()})
    latency = _latency(contest, {name: sweep.latency for name, sweep in swept.items()})
    fastest = max(swept, key=lambda name: statistics.median(throughput[name]))
    soonest = min(swept, key=lambda name: _p50(latency[name]))
    runtimes = {
        name: {
            "latency_ms": _percentiles(latency[name]),
            "texts_per_second": {str(size): speed for size, speed in sweep.speeds.items()},
            "best_batch_size": sweep.best_size,
            "best_texts_per_second": statistics.median(throughput[name]),
            "latency_setting": asdict(sweep.latency),
            "throughput_setting": asdict(sweep.throughput),
            "precision_agreement": sweep.agreement,
        }
        for name, sweep in swept.items()
    }
    metrics = {
        "runtimes": runtimes,
        "left_out": left_out,
        "best": {
            "latency_runtime": soonest,
            "latency_ms": runtimes[soonest]["latency_ms"],
            "throughput_runtime": fastest,
            "batch_size": swept[fastest].best_size,
            "texts_per_second": runtimes[fastest]["best_texts_per_second"],
        },
        "baselines": {name: _baseline(contest, name, throughput[name], latency[name]) for name in BASELINES},
        "speedup": {
            **{f"throughput_over_{name}": ratios(throughput[fastest], throughput[name]) for name in BASELINES},
            **{
                f"latency_over_{name}": ratios(_medians(latency[name]), _medians(latency[soonest]))
                for name in BASELINES
            },
        },
    }
    return metrics, {"latency": swept[soonest].latency, "throughput": swept[fastest].throughput}, latency


def sweep_runtime(contest: Contest, name: str) -> Sweep:
    """Try batch sizes, ways to share the processors, and precisions, each a few times on a short sample, once warm.

    A batch size stands for as many tokens as so many texts of average length have. Batch sizes and ways are tried in
    the lowest precision that keeps the answers, the likeliest to win.
    """
    texts = contest.sample(min(_SHORT_TEXTS, contest.params.throughput_texts))
    mean_length = statistics.fmean(len(row) for row in contest.model.encode(texts))
    several, *others = _ways(name, "throughput")
    agreement = _agreement(contest, name)
    *exacter, lowest = kept_precisions(precisions(name), agreement, contest.least_agreement)
    settings = {
        size: Setting(name, *several, lowest, batch_tokens=round(size * mean_length))
        for size in contest.params.batch_sizes
    }
    runtime = open_setting(settings[contest.params.batch_sizes[0]], contest.model, "throughput")
    speeds = {size: _speed(contest, runtime, setting, texts) for size, setting in settings.items()}
    best = max(speeds, key=lambda size: speeds[size])
    tried = {settings[best]: speeds[best]}
    for way in others:
        setting = Setting(name, *way, lowest, batch_tokens=settings[best].batch_tokens)
        tried[setting] = _speed(contest, open_setting(setting, contest.model, "throughput"), setting, texts)
    for precision in exacter:
        setting = replace(max(tried, key=lambda setting: tried[setting]), precision=precision)
        tried[setting] = _speed(contest, open_setting(setting, contest.model, "throughput"), setting, texts)
    singles = [
        Setting(name, *way, precision, batch_tokens=settings[best].batch_tokens)
        for way in _ways(name, "latency")
        for precision in (lowest, *exacter)
    ]
    latencies = {setting: _trial_latency(contest, setting) for setting in singles}
    soonest = min(singles, key=lambda setting: latencies[setting])
    return Sweep(
        latency=soonest,
        throughput=max(tried, key=lambda setting: tried[setting]),
        best_size=best,
        milliseconds=latencies[soonest],
        speeds=speeds,
        agreement=agreement,
    )


def kept_precisions(
    offered: Sequence[str | None], agreement: Mapping[str, float], least_agreement: float
) -> list[str | None]:
    """Those of the precisions offered that lose nothing, or keep at least so large a share of the labels."""
    return [precision for precision in offered if precision is None or agreement.get(precision, 1.0) >= least_agreement]


def _agreement(contest: Contest, name: str) -> dict[str, float]:
    """Share of the labels that each precision of a runtime keeps, of those that lose something."""
    found = {}
    for precision in precisions(name):
        if precision not in (None, EXACT_PRECISION):
            runtime = open_exported(name, contest.model, goal="throughput", precision=precision)
            labels = predict_exported(contest.model, runtime, contest.texts, _BATCH_SIZE)[0]
            found[str(precision)] = float(numpy.mean(labels == contest.expected))
    return found


def _ways(name: str, goal: Goal) -> list[tuple[int | None, int | None]]:
    """Threads and streams worth trying, the likeliest first; a GPU has one way."""
    processors = thread_limit() or len(usable_processors())
    if name not in CPU_RUNTIMES or processors == 1:
        return [(None, None)]
    if goal == "latency":
        return [(processors, 1), (1, 1)]
    if name in (EAGER, COMPILED):  # one batch at a time
        return [(processors, 1)]
    # OpenVINO shares all its threads out among the streams.
    return [(1 if name == REFERENCE_RUNTIME else processors, processors), (processors, 1)]


def far_behind(contest: Contest, name: str, swept: Mapping[str, Sweep]) -> str:
    """Try a candidate on few texts; say in a line why it cannot win, or nothing where it may."""
    fastest = max(max(sweep.speeds.values()) for sweep in swept.values())
    soonest = min(sweep.milliseconds for sweep in swept.values())
    way = (*_ways(name, "throughput")[0], precisions(name)[-1])
    texts = contest.sample(_TRIAL_TEXTS)
    budget = _BATCH_SIZE * max(len(row) for row in contest.model.encode(texts))
    setting = Setting(name, *way, batch_tokens=budget)
    try:
        speed = _speed(contest, open_setting(setting, contest.model, "throughput"), setting, texts)
        milliseconds = _trial_latency(contest, setting)
    except UserError as problem:
        return str(problem)
    if speed * _WITHIN_REACH >= fastest or milliseconds <= soonest * _WITHIN_REACH:
        return ""
    return (
        f"in a short trial {speed:.0f} texts a second where the best did {fastest:.0f}, "
        f"{milliseconds:.2f} ms for one text where the best took {soonest:.2f}"
    )


def _speed(contest: Contest, runtime: ExportedRuntime, setting: Setting, texts: Sequence[str]) -> float:
    """Texts a second in the best of several passes: whatever disturbs a pass only slows it."""
    work = counting(partial(_answer_all, contest.model, runtime, setting, texts), len(texts))
    work()
    with uncollected():
        return max(items_per_second(work) for _ in range(_PASSES))


def _trial_latency(contest: Contest, setting: Setting) -> float:
    answer = partial(_answer, contest.model, open_setting(setting, contest.model, "latency"))
    texts = contest.sample(_SINGLE_TRIALS)
    for text in texts:
        answer(text)
    with uncollected():
        return statistics.median(durations(answer, texts))


def _throughput(contest: Contest, settings: Mapping[str, Setting]) -> dict[str, list[float]]:
    params = contest.params
    texts, naive_texts = contest.sample(params.throughput_texts), contest.sample(params.naive_texts)
    contenders: dict[str, Callable[[], int]] = {}
    for name, setting in settings.items():
        runtime = open_setting(setting, contest.model, "throughput")
        work = partial(_answer_all, contest.model, runtime, setting, texts)
        work()  # OpenVINO prepares each shape when it first sees it, which a service does once in its life
        contenders[name] = counting(work, len(texts))
    for name, baseline_texts in zip(BASELINES, (texts, naive_texts), strict=True):
        service = contest.services[name]
        service.classify(baseline_texts[:1], 1)
        contenders[name] = counting(
            partial(service.classify, baseline_texts, params.baseline_batch_size), len(baseline_texts)
        )
    return interleave(contenders, params.rounds, contest.seed, warm_up_rounds=0)


def _latency(contest: Contest, settings: Mapping[str, Setting]) -> Latencies:
    params = contest.params
    texts = contest.sample(params.single_texts)
    rounds = min(params.rounds, len(texts))
    every_length = list({len(row): text for row, text in zip(contest.model.encode(texts), texts, strict=True)}.values())
    contenders: dict[str, tuple[Callable[[str], object], Sequence[str]]] = {}
    for name, setting in settings.items():
        answer = partial(_answer, contest.model, open_setting(setting, contest.model, "latency"))
        for text in every_length:
            answer(text)
        contenders[name] = (answer, texts)
    for name, share in zip(BASELINES, (texts, texts[: rounds * _NAIVE_SINGLES_A_ROUND]), strict=True):
        serve = partial(_serve, contest.services[name])
        for text in every_length[:3]:
            serve(text)
        contenders[name] = (serve, share)
    return interleave_latency(contenders, rounds, contest.seed)


def _answer_all(model: Exported, runtime: ExportedRuntime, setting: Setting, texts: Sequence[str]) -> None:
    predict_exported(model, runtime, texts, batch_tokens=setting.batch_tokens)


def _answer(model: Exported, runtime: ExportedRuntime, text: str) -> int:
    return int(predict_exported(model, runtime, [text], 1)[0][0])


def _serve(service: PyTorchService, text: str) -> int:
    return service.classify([text], 1)[0]


def counting(work: Callable[[], object], count: int) -> Callable[[], int]:
    """Let work that answers `count` texts say so."""

    def counted() -> int:
        work()
        return count

    return counted


def _baseline(
    contest: Contest, name: str, throughput: Sequence[float], latency: Sequence[Sequence[float]]
) -> dict[str, Any]:
    return {
        "texts_per_second": statistics.median(throughput),
        "latency_ms": _percentiles(latency),
        "batch_size": contest.params.baseline_batch_size,
        "padded_to": contest.services[name].length or "longest in the batch",
    }


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(latencies) for latencies in rounds]


def _percentiles(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    return percentiles([value for latencies in rounds for value in latencies])


def _p50(rounds: Sequence[Sequence[float]]) -> float:
    return _percentiles(rounds)["p50"]

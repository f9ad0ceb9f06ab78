"""How fast the exported model answers on each runtime, beside both PyTorch baselines."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.core.cascade import Exported, ExportedRuntime, open_exported, predict_exported
from stages.core.params import LatencyParams
from stages.core.runtimes import REFERENCE_RUNTIME, OpenVino
from stages.core.timing import interleave, interleave_latency, items_per_second, percentiles, ratios, uncollected
from stages.evaluate.baselines import PyTorchService

RUNTIMES = (REFERENCE_RUNTIME, OpenVino.name)
BASELINES = ("fair", "naive")

_SHORT_TEXTS = 256  # enough to rank batch sizes, which differ by more than the noise of so many
_NAIVE_SINGLES_A_ROUND = 4


@dataclass(frozen=True)
class Contest:
    """What takes part in the measurement."""

    model: Exported
    services: Mapping[str, PyTorchService]
    """The baselines, `fair` and `naive`."""
    texts: Sequence[str]
    """Real texts, from which samples are drawn."""
    params: LatencyParams
    seed: int

    def sample(self, count: int) -> list[str]:
        """Draw texts in random order; all of them if there are fewer."""
        return random.Random(self.seed).sample(list(self.texts), min(count, len(self.texts)))


def measure_speed(contest: Contest) -> dict[str, Any]:
    """Measure throughput and latency of both runtimes and both baselines.

    Returns:
        `runtimes`, `best`, `baselines` and `speedup` of the stage's metrics, without memory.
    """
    swept = {name: _sweep(contest, name) for name in RUNTIMES}
    throughput = _throughput(contest, {name: _best_size(speeds) for name, speeds in swept.items()})
    latency = _latency(contest)
    fastest = max(RUNTIMES, key=lambda name: statistics.median(throughput[name]))
    soonest = min(RUNTIMES, key=lambda name: _p50(latency[name]))
    runtimes = {
        name: {
            "latency_ms": _percentiles(latency[name]),
            "texts_per_second": {str(size): speed for size, speed in swept[name].items()},
            "best_batch_size": _best_size(swept[name]),
            "best_texts_per_second": statistics.median(throughput[name]),
        }
        for name in RUNTIMES
    }
    return {
        "runtimes": runtimes,
        "best": {
            "latency_runtime": soonest,
            "latency_ms": runtimes[soonest]["latency_ms"],
            "throughput_runtime": fastest,
            "batch_size": runtimes[fastest]["best_batch_size"],
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


def _sweep(contest: Contest, name: str) -> dict[int, float]:
    """Texts a second at each batch size, each tried once on a short sample after a run to warm up."""
    model, texts = contest.model, contest.sample(min(_SHORT_TEXTS, contest.params.throughput_texts))
    runtime = open_exported(name, model, goal="throughput")
    speeds = {}
    with uncollected():
        for size in contest.params.batch_sizes:
            work = _counting(partial(predict_exported, model, runtime, texts, size), len(texts))
            work()
            speeds[size] = items_per_second(work)
    return speeds


def _throughput(contest: Contest, sizes: Mapping[str, int]) -> dict[str, list[float]]:
    params = contest.params
    texts, naive_texts = contest.sample(params.throughput_texts), contest.sample(params.naive_texts)
    contenders: dict[str, Callable[[], int]] = {}
    for name in RUNTIMES:
        runtime = open_exported(name, contest.model, goal="throughput")
        work = partial(predict_exported, contest.model, runtime, texts, sizes[name])
        work()  # OpenVINO prepares each shape when it first sees it, which a service does once in its life
        contenders[name] = _counting(work, len(texts))
    for name, baseline_texts in zip(BASELINES, (texts, naive_texts), strict=True):
        service = contest.services[name]
        service.classify(baseline_texts[:1], 1)
        contenders[name] = _counting(
            partial(service.classify, baseline_texts, params.baseline_batch_size), len(baseline_texts)
        )
    return interleave(contenders, params.rounds, contest.seed, warm_up_rounds=0)


def _latency(contest: Contest) -> dict[str, list[list[float]]]:
    params = contest.params
    texts = contest.sample(params.single_texts)
    rounds = min(params.rounds, len(texts))
    every_length = list({len(row): text for row, text in zip(contest.model.encode(texts), texts, strict=True)}.values())
    contenders: dict[str, tuple[Callable[[str], object], Sequence[str]]] = {}
    for name in RUNTIMES:
        answer = partial(_answer, contest.model, open_exported(name, contest.model, goal="latency"))
        for text in every_length:
            answer(text)
        contenders[name] = (answer, texts)
    for name, share in zip(BASELINES, (texts, texts[: rounds * _NAIVE_SINGLES_A_ROUND]), strict=True):
        serve = partial(_serve, contest.services[name])
        for text in every_length[:3]:
            serve(text)
        contenders[name] = (serve, share)
    return interleave_latency(contenders, rounds, contest.seed)


def _answer(model: Exported, runtime: ExportedRuntime, text: str) -> int:
    return int(predict_exported(model, runtime, [text], 1)[0][0])


def _serve(service: PyTorchService, text: str) -> int:
    return service.classify([text], 1)[0]


def _counting(work: Callable[[], object], count: int) -> Callable[[], int]:
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


def _best_size(speeds: Mapping[int, float]) -> int:
    return max(speeds, key=lambda size: speeds[size])


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(latencies) for latencies in rounds]


def _percentiles(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    return percentiles([value for latencies in rounds for value in latencies])


def _p50(rounds: Sequence[Sequence[float]]) -> float:
    return _percentiles(rounds)["p50"]

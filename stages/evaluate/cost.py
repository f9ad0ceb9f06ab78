"""What a variant costs beside its speed: curves, the way to the first answer, operations, energy and money."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pandas

from stages.core.cascade import (
    ALL_PASSED_ON,
    CascadeRuntime,
    Exported,
    ExportedRuntime,
    models_of,
    predict_exported,
)
from stages.core.ceilings import measure_products, operations_by_kind
from stages.core.choice import Setting, open_setting
from stages.core.hardware import energy_joules, joules_between
from stages.core.params import CostParams
from stages.core.runtimes import ExportedModel, Runtime, saturates
from stages.core.timing import interleave
from stages.evaluate.serving import Serving, watch_serving
from stages.evaluate.speed import CPU_RUNTIMES, counting

_SHARES = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_FLOATS = {"f32": "fp32", "bf16": "bf16"}
_SECONDS_OF_ENERGY = 1.0  # the counter moves a thousand times a second
_GIGA = 1e9


@dataclass(frozen=True)
class Service:
    """A model as it runs fastest here."""

    model: Exported
    setting: Setting
    """For throughput."""
    texts: Sequence[str]
    """Real texts, in an order drawn at random."""
    texts_per_second: float
    passed_on: float
    """Share of the texts that a cascade leaves to its larger model; 0 for a single model."""


def measure_cost(service: Service, serving: Serving, params: CostParams) -> dict[str, Any]:
    """Measure what is told of a variant beside its speed.

    Args:
        service: model and setting.
        serving: of one fresh process in that setting; more are started for the rest of the cold starts.
        params: how much to measure.

    Returns:
        `operations`, `ceilings`, `cold_start`, `energy_joules_per_thousand_texts` (None where the machine does not
        tell), and `price_per_million_texts` where the params know a price.
    """
    runtime = open_setting(service.setting, service.model, "throughput")
    starts = [serving.cold_start_seconds]
    parts = {"import": serving.import_seconds, "load": serving.load_seconds, "answer": serving.answer_seconds}
    for _ in range(params.cold_starts - 1):
        again = watch_serving(service.model.folder, service.setting, service.texts[:1])
        starts.append(again.cold_start_seconds)
    return {
        "operations": count_operations(service),
        "ceilings": measure_ceiling_share(service, runtime),
        "cold_start": {
            "seconds": statistics.median(starts),
            "low": min(starts),
            "high": max(starts),
            "starts": len(starts),
            "parts": parts,
        },
        "energy_joules_per_thousand_texts": energy_per_thousand(
            partial(predict_exported, service.model, runtime, service.texts, batch_tokens=service.setting.batch_tokens),
            len(service.texts),
        ),
        **price(service.texts_per_second, params.price_per_hour),
    }


def price(texts_per_second: float, price_per_hour: float | None) -> dict[str, float]:
    """Price of a million texts at full load, in the currency of the hour's price; nothing without one."""
    if price_per_hour is None:
        return {}
    return {"price_per_million_texts": price_per_hour / 3600.0 / texts_per_second * 1e6}


def energy_per_thousand(
    work: Callable[[], object], count: int, counter: Callable[[], float | None] = energy_joules
) -> float | None:
    """Joules of a thousand texts, everything that the processor does meanwhile included; None if nothing is told.

    Args:
        work: answers `count` texts; repeated for about a second.
        count: of them.
        counter: that tells joules.
    """
    before, started, done = counter(), time.monotonic(), 0
    if before is None:
        return None
    while time.monotonic() - started < _SECONDS_OF_ENERGY:
        work()
        done += count
    spent = joules_between(before, counter())
    return None if spent is None else 1000.0 * spent / done


def count_operations(service: Service) -> dict[str, float]:
    """Count operations per text at the mean length, as `per_text` in all and in `int8`, and the `tokens` of a text.

    Each model of a cascade counts for the share of the texts that it sees.
    """
    tokens = _mean_tokens(service)
    by_kind = {"float": 0.0, "int8": 0.0}
    for part, share in _shares(service):
        for kind, operations in operations_by_kind(part.onnx_path, tokens).items():
            by_kind[kind] += share * operations
    return {"per_text": by_kind["float"] + by_kind["int8"], "int8": by_kind["int8"], "tokens": tokens}


def measure_ceiling_share(service: Service, runtime: ExportedRuntime) -> dict[str, Any]:
    """Measure how fast this machine multiplies matrices, and how much of that the variant uses.

    Returns:
        `fp32`, `bf16` and `int8` in giga-operations a second; `share`: the seconds that the operations of a text would
        take at these rates, over those that a text takes, tokenization and all else included; None on a GPU, whose
        ceilings are not measured.
    """
    if service.setting.runtime not in CPU_RUNTIMES:
        return {"share": None}
    ceilings = measure_products()
    seconds = 0.0
    for (part, share), opened in zip(_shares(service), _opened(runtime), strict=True):
        # A runtime that keeps away from products that saturate computes them in float.
        whole = _FLOATS.get(opened.precision, "fp32")
        rates = {"float": ceilings[whole], "int8": ceilings[whole if saturates(part) else "int8"]}
        operations = operations_by_kind(part.onnx_path, _mean_tokens(service))
        seconds += share * sum(operations[kind] / (rates[kind] * _GIGA) for kind in rates)
    return {**ceilings, "share": seconds * service.texts_per_second}


def _shares(service: Service) -> list[tuple[ExportedModel, float]]:
    """The single models, each with the share of the texts that it sees."""
    if isinstance(service.model, ExportedModel):
        return [(service.model, 1.0)]
    # A threshold that passes everything on spares the small model.
    first = 0.0 if service.model.threshold >= ALL_PASSED_ON else 1.0
    return [(service.model.small, first), (service.model.large, service.passed_on)]


def _opened(runtime: ExportedRuntime) -> list[Runtime]:
    return [runtime.small, runtime.large] if isinstance(runtime, CascadeRuntime) else [runtime]


def _mean_tokens(service: Service) -> float:
    return statistics.fmean(map(len, service.model.encode(service.texts)))


def throughput_curves(service: Service, params: CostParams, seed: int) -> pandas.DataFrame:
    """Measure throughput over batch size and over length; all points take turns.

    The batches hold real texts. The lengths hold pieces of the real texts, joined and cut anew, as many a batch as
    the service's budget of tokens takes.

    Args:
        service: model and setting.
        params: points and rounds.
        seed: of the order and the cuts.

    Returns:
        `curve` (batch or length), `size` (texts, or tokens asked for), `tokens` (mean of the texts answered),
        `texts_per_second` (median of the rounds), `low`, `high`; a row a point.
    """
    model, runtime = service.model, open_setting(service.setting, service.model, "throughput")
    points: dict[tuple[str, int], tuple[list[str], dict[str, int]]] = {}
    mean = _mean_tokens(service)
    for size in params.curve_batch_sizes:
        count = max(size, round(params.curve_tokens / mean))
        points["batch", size] = (_cycle(service.texts, count), {"batch_size": size})
    longest = models_of(model)[0].maximum_length
    for length in [each for each in params.curve_lengths if each <= longest]:
        texts = texts_of_length(model, service.texts, length, max(1, params.curve_tokens // length), seed)
        points["length", length] = (texts, {"batch_tokens": max(service.setting.batch_tokens, length)})
    work = {
        f"{curve} {size}": counting(partial(predict_exported, model, runtime, texts, **batching), len(texts))
        for (curve, size), (texts, batching) in points.items()
    }
    speeds = interleave(work, params.curve_rounds, seed)
    rows = [
        {
            "curve": curve,
            "size": size,
            "tokens": statistics.fmean(map(len, model.encode(texts))),
            "texts_per_second": statistics.median(speeds[f"{curve} {size}"]),
            "low": min(speeds[f"{curve} {size}"]),
            "high": max(speeds[f"{curve} {size}"]),
        }
        for (curve, size), (texts, _) in points.items()
    ]
    return pandas.DataFrame(rows)


def texts_of_length(model: Exported, texts: Sequence[str], length: int, count: int, seed: int) -> list[str]:
    """Cut pieces of about so many tokens, special tokens included, out of texts joined end to end."""
    whole = " ".join(texts)
    tokens = sum(map(len, model.encode(texts))) - _special(model) * len(texts)
    characters = max(1, round((length - _special(model)) * len(whole) / max(tokens, 1)))
    whole = whole * (characters // len(whole) + 2)
    generator = random.Random(seed)
    starts = [generator.randrange(len(whole) - characters) for _ in range(count)]
    return [whole[start : start + characters] for start in starts]


def _special(model: Exported) -> int:
    return len(model.encode([""])[0])


def latency_quantiles(latencies: Mapping[str, Sequence[Sequence[float]]]) -> pandas.DataFrame:
    """Tabulate milliseconds of one text at a time.

    Args:
        latencies: milliseconds by contender, one list a round.

    Returns:
        `contender`, `share` and `milliseconds`: that share of the texts took at most so long.
    """
    rows = [
        {"contender": name, "share": share, "milliseconds": float(value)}
        for name, rounds in latencies.items()
        for share, value in zip(_SHARES, numpy.quantile(numpy.concatenate(rounds), _SHARES), strict=True)
    ]
    return pandas.DataFrame(rows)


def write_cost_tables(
    folder: Path, latencies: Mapping[str, Sequence[Sequence[float]]], curves: pandas.DataFrame
) -> None:
    """Write latency.csv, throughput_batch.csv and throughput_length.csv."""
    latency_quantiles(latencies).to_csv(folder / "latency.csv", index=False, lineterminator="\n")
    for name, points in curves.groupby("curve"):
        points.drop(columns="curve").to_csv(folder / f"throughput_{name}.csv", index=False, lineterminator="\n")


def _cycle(texts: Sequence[str], count: int) -> list[str]:
    return [texts[index % len(texts)] for index in range(count)]

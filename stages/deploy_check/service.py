"""One service in a fresh process: load, answer, measure, report.

`python -m stages.deploy_check.service` is that process; `check` and `soak_run` ask it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.core.fresh import answer_request, ask_fresh_process
from stages.core.hardware import peak_memory_mb
from stages.core.metrics import Array
from stages.core.runtimes import ExportedModel, Runtime, open_runtime, predict
from stages.core.timing import durations, items_per_second, percentiles, uncollected
from stages.deploy_check.inventory import CPU_CONTENDERS
from stages.deploy_check.soak import soak

_BATCH_SIZES = (8, 32, 128)
_SINGLE_TEXTS = 200
_THROUGHPUT_TEXTS = 512
_SECONDS_TO_CHECK = 400.0  # compiling for a GPU takes minutes


@dataclass(frozen=True)
class Service:
    """A model on a runtime."""

    contender: str
    """Name of a runtime, or `torch-MODE-PRECISION`."""
    model: str
    """Folder of the exported model."""
    checkpoint: str
    """Folder of the float checkpoint."""
    seed: int
    device: str = "cuda"
    """Of the PyTorch contenders."""


def check(service: Service, texts: Sequence[str], parity_texts: Sequence[str]) -> dict[str, Any]:
    """Load a service in a fresh process and measure it.

    Returns:
        `load_seconds`, `precision`, `memory_mb` of the process, `gpu_memory_mb` (null on a CPU), `probabilities` of the
        parity texts, `latency_ms` at batch 1, `texts_per_second` by batch size, `best_batch_size`,
        `best_texts_per_second`.

    Raises:
        FreshProcessError: if it does not load or breaks down.
    """
    request = {"service": asdict(service), "texts": list(texts), "parity_texts": list(parity_texts)}
    return ask_fresh_process(__spec__.name, request, _SECONDS_TO_CHECK)


def soak_run(service: Service, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    """Soak a service in a fresh process; see `soak.soak`. Adds `memory_mb` and `gpu_memory_mb`.

    Raises:
        FreshProcessError: if it does not load or breaks down.
    """
    request = {"service": asdict(service), "texts": list(texts), "soak_seconds": seconds}
    return ask_fresh_process(__spec__.name, request, _SECONDS_TO_CHECK + 2 * seconds)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    service, texts = Service(**request["service"]), request["texts"]
    on_gpu = service.contender not in CPU_CONTENDERS and service.device == "cuda"
    before = _gpu_memory_mb() if on_gpu else None
    started = time.monotonic()
    model = ExportedModel.load(Path(service.model))
    runtime = _open(service, model)
    predict(model, runtime, texts[:1], 1)
    load_seconds = time.monotonic() - started
    if "soak_seconds" in request:
        _warm_up(model, runtime, texts)
        answer = partial(_probabilities, model, runtime)
        result = soak(answer, texts, len(model.labels), request["soak_seconds"], service.seed)
    else:
        result = {
            "load_seconds": round(load_seconds, 2),
            "precision": runtime.precision,
            "probabilities": _probabilities(model, runtime, request["parity_texts"]).tolist(),
            **_speed(model, runtime, texts),
        }
    after = _gpu_memory_mb() if on_gpu else None
    gpu_memory = None if before is None or after is None else max(0.0, after - before)
    return {**result, "memory_mb": peak_memory_mb(), "gpu_memory_mb": gpu_memory}


def _open(service: Service, model: ExportedModel) -> Runtime:
    if not service.contender.startswith("torch-"):
        return open_runtime(service.contender, model)
    from stages.deploy_check.torch_runtime import TorchRuntime

    return TorchRuntime(service.contender, Path(service.checkpoint), model, service.device)


def _probabilities(model: ExportedModel, runtime: Runtime, texts: Sequence[str]) -> Array:
    return predict(model, runtime, texts, max(_BATCH_SIZES))[1]


def _speed(model: ExportedModel, runtime: Runtime, texts: Sequence[str]) -> dict[str, Any]:
    _warm_up(model, runtime, texts)
    many = texts[:_THROUGHPUT_TEXTS]
    throughput = {}
    with uncollected():
        latency = durations(lambda text: predict(model, runtime, [text], 1), texts[:_SINGLE_TEXTS])
        for size in _BATCH_SIZES:
            work = partial(_answer_all, model, runtime, many, size)
            work()
            throughput[size] = items_per_second(work)
    best = max(throughput, key=lambda size: throughput[size])
    return {
        "latency_ms": percentiles(latency),
        "texts_per_second": {str(size): speed for size, speed in throughput.items()},
        "best_batch_size": best,
        "best_texts_per_second": throughput[best],
    }


def _answer_all(model: ExportedModel, runtime: Runtime, texts: Sequence[str], batch_size: int) -> int:
    return len(predict(model, runtime, texts, batch_size)[0])


def _warm_up(model: ExportedModel, runtime: Runtime, texts: Sequence[str]) -> None:
    """Answer one text of every length: runtimes prepare a shape when they first see it, once in a service's life."""
    every_length = {len(row): text for row, text in zip(model.encode(texts), texts, strict=True)}
    for text in every_length.values():
        predict(model, runtime, [text], 1)


def _gpu_memory_mb() -> float | None:
    """Memory in use on all GPUs in MiB, None where the driver does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return float(sum(float(line) for line in done.stdout.split("\n") if line.strip()))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


if __name__ == "__main__":
    answer_request(_work)

"""The measurement: every contender made, served, and timed in turns."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from benchmarks.contenders import Contender, compressing_minutes
from benchmarks.environments import pins, prepare, python_of
from benchmarks.headroom import chosen
from benchmarks.workers import Worker, WorkerError, run_once
from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_maximum_length, load_pad_id, sample
from stages.core.hardware import thread_limit
from stages.core.observe.progress import say, track

_CALIBRATION_TEXTS = 512
_COMPRESS_SECONDS = 1800.0
_WARM_UP_TEXTS = 10
_MODEL_SUFFIXES = (".onnx", ".onnx_data", ".data", ".xml", ".bin", ".safetensors")


@dataclass(frozen=True)
class Plan:
    """What is measured, and how much of it."""

    artifacts: Path
    """Of a finished run."""
    environments: Path
    """Holds a virtual environment a peer."""
    work: Path
    """For the peers' models and logs; emptied first."""
    rounds: int
    texts: int
    """Answered in a round, at most."""
    single_texts: int
    """Answered one by one in all rounds together, at most."""
    seed: int

    @property
    def data(self) -> Path:
        """The tokenized splits."""
        return self.artifacts / "tokenize" / "data"

    @property
    def checkpoint(self) -> Path:
        """The fine-tuned model, in Hugging Face's format."""
        return self.artifacts / "finetune" / "model"


def measure(plan: Plan, contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Make, serve and time the contenders.

    Returns:
        by name: `predictions` on the test split (None for a baseline that answers only some texts), `batch_size`,
        `sizes`, `texts_per_second` (a number a round), `latency_ms` (a number a text), `model_bytes`,
        `peak_memory_mb`, `compress_minutes`, `versions`, `runtime`; or `error` alone, one line.
    """
    shutil.rmtree(plan.work, ignore_errors=True)
    plan.work.mkdir(parents=True)
    _write_task(plan)
    test = load_examples(plan.data, "test")
    results: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        results[contender.name] = _guarded(contender, partial(_make, plan, contender, results))
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender in track(contenders, "contender, starting"):
            if "error" not in results[contender.name]:
                worker = stack.enter_context(_start(plan, contender))
                results[contender.name] |= _guarded(contender, partial(_sweep, plan, contender, worker, test))
                workers[contender.name] = worker
        running = [each for each in contenders if "error" not in results[each.name]]
        _take_turns(plan, running, workers, results, test)
    return results


def _guarded(contender: Contender, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A peer that fails is reported, and the others go on."""
    try:
        return work()
    except (WorkerError, UserError) as error:
        say(f"{contender.title}: {error}")
        return {"error": str(error)}


def _write_task(plan: Plan) -> None:
    """Write what peers may calibrate on: texts of the training split, never of the test."""
    examples = sample(load_examples(plan.data, "train"), _CALIBRATION_TEXTS, plan.seed)
    write_json(
        plan.work / "task.json",
        {
            "checkpoint": str(plan.checkpoint.resolve()),
            "maximum_length": load_maximum_length(plan.data),
            "pad_id": load_pad_id(plan.data),
            "texts": examples.texts,
            "labels": examples.labels.tolist(),
        },
    )


def _make(plan: Plan, contender: Contender, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Let a peer compress the checkpoint; Headroom's models are there already."""
    if contender.headroom:
        folder = plan.artifacts / contender.variant / "model"
        return {
            "compress_minutes": compressing_minutes(plan.artifacts, contender),
            "model_bytes": model_bytes(folder),
            "versions": {},
        }
    if contender.made_by:
        if "error" in results[contender.made_by]:
            return {"error": results[contender.made_by]["error"]}
        return dict(results[contender.made_by])
    prepare(contender.peer, plan.environments)
    folder = _model_folder(plan, contender)
    request = {
        "peer": contender.peer,
        "variant": contender.variant,
        "task": str((plan.work / "task.json").resolve()),
        "out": str(folder.resolve()),
    }
    say(f"{contender.title}: compressing")
    seconds = run_once(
        python_of(contender.peer, plan.environments), "benchmarks.peers.compress", request, _COMPRESS_SECONDS
    )
    return {
        "compress_minutes": seconds / 60,
        "model_bytes": model_bytes(folder),
        "versions": pins(contender.peer),
    }


def _model_folder(plan: Plan, contender: Contender) -> Path:
    return plan.work / "models" / (contender.made_by or contender.name)


def model_bytes(folder: Path) -> int:
    """Size of the files that hold weights and graph, in bytes; tokenizer and configuration do not count."""
    files = [path for path in folder.glob("**/*") if path.is_file()]
    linked = [path for link in folder.iterdir() if link.is_symlink() for path in link.resolve().iterdir()]
    return sum(path.stat().st_size for path in [*files, *linked] if path.suffix in _MODEL_SUFFIXES)


def _start(plan: Plan, contender: Contender) -> Worker:
    python = python_of(contender.peer, plan.environments)
    log = plan.work / "logs" / f"{contender.name}.log"
    if contender.headroom:
        request: dict[str, Any] = {
            "model": str((plan.artifacts / contender.variant).resolve()),
            "settings": chosen(plan.artifacts, contender.variant),
        }
        return Worker(python, "benchmarks.headroom", request, log)
    request = {
        "peer": contender.peer,
        "variant": contender.variant,
        "model": str(_model_folder(plan, contender).resolve()),
        "tokenizer": str((plan.checkpoint / "tokenizer.json").resolve()),
        "maximum_length": load_maximum_length(plan.data),
        "pad_id": load_pad_id(plan.data),
        "by_length": contender.by_length,
        "padded_to": contender.padded_to,
        "threads": thread_limit(),
    }
    return Worker(python, "benchmarks.peers.serve", request, log)


def _sweep(plan: Plan, contender: Contender, worker: Worker, test: Examples) -> dict[str, Any]:
    """Find the best batch size, read the memory that serving with it takes, and take the answers to all texts."""
    texts = _timed_texts(plan, contender, test)
    sizes = worker.ask({"do": "sweep", "texts": texts, "batch_sizes": contender.batch_sizes})["sizes"]
    best = max(sizes, key=lambda entry: entry["texts_per_second"])
    request = {"do": "predict", "texts": test.texts, "batch_size": best["batch_size"]}
    predictions = worker.ask(request)["predictions"] if contender.own_quality else None
    return {
        "batch_size": best["batch_size"],
        "peak_memory_mb": best["peak_memory_mb"],
        "sizes": {str(entry["batch_size"]): entry["texts_per_second"] for entry in sizes},
        "predictions": predictions,
        "runtime": _runtime_names(plan, contender),
    }


def _runtime_names(plan: Plan, contender: Contender) -> dict[str, str]:
    if not contender.headroom:
        return {}
    settings = chosen(plan.artifacts, contender.variant)
    return {goal: setting["runtime"] for goal, setting in settings.items()}


def _timed_texts(plan: Plan, contender: Contender, test: Examples) -> list[str]:
    texts = random.Random(plan.seed).sample(test.texts, min(plan.texts, len(test.texts)))
    return texts[: contender.texts]


def _take_turns(
    plan: Plan,
    contenders: Sequence[Contender],
    workers: Mapping[str, Worker],
    results: dict[str, dict[str, Any]],
    test: Examples,
) -> None:
    """Time everybody once a round, in an order drawn anew; who fails here drops out."""
    order, generator = list(contenders), random.Random(plan.seed)
    for contender in contenders:
        results[contender.name] |= {"texts_per_second": [], "latency_ms": []}
    for number in track(range(plan.rounds), "round"):
        generator.shuffle(order)
        for contender in list(order):
            work = partial(_turn, plan, contender, workers[contender.name], results[contender.name], test, number)
            turn = _guarded(contender, work)
            if "error" in turn:
                results[contender.name] = turn
                order.remove(contender)


def _turn(
    plan: Plan, contender: Contender, worker: Worker, result: dict[str, Any], test: Examples, number: int
) -> dict[str, Any]:
    texts = _timed_texts(plan, contender, test)
    many = worker.ask({"do": "throughput", "texts": texts, "batch_size": result["batch_size"]})
    result["texts_per_second"].append(many["texts_per_second"])
    singles = texts[: plan.single_texts]
    request = {"do": "latency", "texts": singles[number :: plan.rounds], "warm_up": texts[-_WARM_UP_TEXTS:]}
    result["latency_ms"] += worker.ask(request)["milliseconds"]
    return {}


def mean_tokens(plan: Plan) -> float:
    """Tokens a test text, special tokens included."""
    return float(numpy.mean([len(row) for row in load_examples(plan.data, "test").input_ids]))


def read_results(path: Path) -> dict[str, Any]:
    """Results of earlier runs, by task; empty if there are none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found

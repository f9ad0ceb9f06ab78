from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pandas
import pytest
import yaml

from stages.core.artifacts import read_json, write_manifest
from stages.core.errors import UserError
from stages.core.fresh import FreshProcessError, ask_fresh_process
from stages.core.observe.tracking import RunRecord, flatten
from stages.core.params import DeployCheckParams, Params, TargetParams, parse_params
from stages.core.runtimes import ExportedModel, open_runtime, predict
from stages.core.stage import StageRun
from stages.deploy_check import __main__ as room
from stages.deploy_check import inventory, torch_runtime
from stages.deploy_check.service import Service, check
from stages.deploy_check.soak import ODD_TEXTS, soak
from stages.deploy_check.verdict import decide, missed_in_soak, missed_targets

PROJECT = Path(__file__).parents[3]
TARGET = TargetParams(required=True, latency_p95_ms=10.0, throughput=100.0, memory_mb=500.0)
GOOD = {
    "latency_ms": {"p50": 1.0, "p95": 9.0, "p99": 30.0},
    "best_texts_per_second": 150.0,
    "memory_mb": 400.0,
    "gpu_memory_mb": None,
    "parity": 0.001,
}


def small_params(**changes: dict[str, Any]) -> Params:
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    raw["deploy_check"] |= {"parity_texts": 16, "soak_seconds": 0.3}
    raw["deploy_check"]["cpu"] |= {"latency_p95_ms": 10_000.0, "throughput": 1e-3}
    for name, values in changes.items():
        raw["deploy_check"][name] |= values
    return parse_params(raw, "params.yaml")


MakeRun = Callable[..., StageRun]


@pytest.fixture
def make_run(
    exported_unit: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeRun:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("stages.core.hardware.list_gpus", list)
    monkeypatch.setattr(inventory, "_DRIVER_GPUS", tmp_path / "no driver")

    def make(params: Params, model: Path = exported_unit) -> StageRun:
        staging = tmp_path / "staging"
        staging.mkdir()
        inputs = {"model": model, "checkpoint": tiny_checkpoint, "data": tiny_data}
        record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
        return StageRun("deploy_check", params, inputs, staging, tmp_path / "state", record)

    return make


def test_a_good_model_passes_and_a_missing_gpu_does_not(make_run: MakeRun) -> None:
    run = make_run(small_params())
    metrics = room.run_deploy_check(run)
    assert (metrics["verdict"], metrics["gpu"], metrics["failures"]) == ("passed", "absent", [])
    cpu, gpu = metrics["devices"]["cpu"], metrics["devices"]["gpu"]
    assert cpu["status"] == "passed"
    assert cpu["measured"]["parity"] <= 0.05
    assert cpu["soak"]["requests"] >= 20
    assert cpu["soak"]["error_rate"] == 0.0
    assert cpu["measured"]["latency_ms"]["p95"] > 0
    assert gpu["status"] == "absent"
    details = read_json(run.staging / "details.json")
    assert set(details["contenders"]["cpu"]) == {"onnxruntime-cpu", "openvino-cpu"}
    assert "CPUExecutionProvider" in details["inventory"]["execution_providers"]
    assert any(isinstance(value, float) for value in flatten(metrics).values())
    assert not room.VERDICT.exists()


def test_a_required_gpu_that_is_absent_fails(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="gpu: absent"):
        room.run_deploy_check(make_run(small_params(gpu={"required": True})))
    kept = read_json(room.VERDICT)
    assert (kept["verdict"], kept["gpu"]) == ("failed", "absent")
    assert kept["devices"]["cpu"]["status"] == "passed"


def test_every_missed_target_is_a_line(make_run: MakeRun) -> None:
    impossible = {"latency_p95_ms": 1e-6, "throughput": 1e12, "memory_mb": 1.0}
    with pytest.raises(UserError) as problem:
        room.run_deploy_check(make_run(small_params(cpu=impossible)))
    text = str(problem.value)
    for name in ("latency_p95_ms", "throughput", "memory_mb", "artifacts/.state/deploy_check-verdict.json"):
        assert name in text
    assert read_json(room.VERDICT)["verdict"] == "failed"


def test_a_target_that_is_not_required_only_costs_the_verdict(make_run: MakeRun) -> None:
    metrics = room.run_deploy_check(make_run(small_params(cpu={"required": False, "throughput": 1e12})))
    assert metrics["verdict"] == "failed"  # nothing serves the model as wished
    assert any("throughput" in line for line in metrics["failures"])


def test_a_model_that_does_not_load_is_told_in_a_line(make_run: MakeRun, exported_copy: Path) -> None:
    (exported_copy / "model" / "model.onnx").write_bytes(b"nonsense")
    write_manifest(exported_copy / "model")
    with pytest.raises(UserError, match=r"cpu: does not run: .*cannot load it"):
        room.run_deploy_check(make_run(small_params(), exported_copy / "model"))


def test_a_card_without_packages_is_unusable_not_passed(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.core.hardware.list_gpus", lambda: [{"name": "NVIDIA L4"}])
    monkeypatch.setattr(room, "gpu_contenders", list)
    metrics = room.run_deploy_check(make_run(small_params()))
    assert metrics["gpu"] == "present"
    assert metrics["devices"]["gpu"]["status"] == "unusable"


def test_each_target_can_be_missed_alone() -> None:
    assert missed_targets("cpu", GOOD, TARGET, tolerance=0.01) == []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"latency_ms": {"p95": 10.5}}, r"cpu: latency p95 is 10.50 ms, deploy_check.cpu.latency_p95_ms is 10"),
        ({"best_texts_per_second": 99.0}, "cpu: 99 texts a second, deploy_check.cpu.throughput is 100"),
        ({"memory_mb": 501.0}, "cpu: 501 MiB of memory, deploy_check.cpu.memory_mb is 500"),
        ({"parity": 0.02}, "cpu: probabilities differ by 0.02 from the CPU reference, deploy_check.tolerance is 0.01"),
    ]
    for change, line in cases:
        assert missed_targets("cpu", GOOD | change, TARGET, tolerance=0.01) == [line]


def test_a_gpu_is_judged_by_the_memory_of_the_card() -> None:
    on_gpu = GOOD | {"memory_mb": 4000.0, "gpu_memory_mb": 300.0}
    assert missed_targets("gpu", on_gpu, TARGET, tolerance=0.01) == []
    assert "300" not in missed_targets("gpu", GOOD, TARGET, tolerance=0.01)[0]
    assert "does not tell its memory" in missed_targets("gpu", GOOD, TARGET, tolerance=0.01)[0]


def test_probabilities_that_are_not_finite_fail(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = GOOD | {"probabilities": [[float("nan"), 1.0]]}
    monkeypatch.setattr(room, "check", lambda *_: broken)
    with pytest.raises(UserError, match="cpu: does not run: it answers with probabilities that are not finite"):
        room.run_deploy_check(make_run(small_params()))


def test_soak_targets() -> None:
    params = small_params().deploy_check.model_copy(update={"soak_error_rate": 0.1})
    result = {"requests": 100, "errors": 10, "error_rate": 0.1, "messages": ["x"], "memory_mb": 400.0}
    assert missed_in_soak("cpu", result, TARGET, params) == []
    worse = result | {"errors": 11, "error_rate": 0.11, "memory_mb": 600.0}
    lines = missed_in_soak("cpu", worse, TARGET, cast(DeployCheckParams, params))
    assert [line.split(",")[0] for line in lines] == [
        "cpu: 11 of 100 soak requests failed (x)",
        "cpu: 600 MiB of memory in the soak run",
    ]


def test_the_verdict_follows_what_is_required() -> None:
    passed = {"status": "passed", "required": True, "failures": []}
    missed = {"status": "failed", "required": False, "failures": ["gpu: slow"]}
    absent = {"status": "absent", "required": False, "failures": ["gpu: absent"]}
    assert decide({"cpu": passed, "gpu": absent}) == ("passed", [])
    assert decide({"cpu": passed, "gpu": missed}) == ("passed", [])
    assert decide({"cpu": passed, "gpu": absent | {"required": True}}) == ("failed", ["gpu: absent"])
    assert decide({"cpu": missed, "gpu": absent}) == ("failed", ["gpu: slow", "gpu: absent"])


def uniform(texts: Sequence[str]) -> numpy.ndarray:
    return numpy.full((len(texts), 2), 0.5)


def test_a_soak_run_sends_every_odd_text_alone_and_in_company() -> None:
    alone, together = set(), set()

    def answer(texts: Sequence[str]) -> numpy.ndarray:
        (alone if len(texts) == 1 else together).update(texts)
        return uniform(texts)

    result = soak(answer, ["one", "two"], labels=2, seconds=0.5, seed=1)
    assert result["errors"] == 0
    assert set(ODD_TEXTS) <= alone
    assert set(ODD_TEXTS) <= together
    assert result["latency_ms"]["p95"] >= 0
    assert result["latency_drift"] > 0
    assert result["seconds"] >= 0.5


def test_a_soak_run_counts_what_goes_wrong() -> None:
    def answer(texts: Sequence[str]) -> numpy.ndarray:
        if "" in texts:
            raise ValueError("empty\ntext")
        if len(texts) == 8:
            return uniform(texts[1:])
        if len(texts) == 32:
            return uniform(texts) * numpy.nan
        return uniform(texts) * (2.0 if len(texts) == 2 else 1.0)

    result = soak(answer, ["one"], labels=2, seconds=0.0, seed=1)
    assert result["errors"] >= 4
    assert result["error_rate"] == result["errors"] / result["requests"]
    assert result["messages"][0] == "ValueError: empty text"
    assert any("shape (7, 2)" in line for line in result["messages"])
    assert any("sum to 1" in line for line in result["messages"])


def test_pytorch_serves_the_checkpoint_like_the_onnx_file(
    exported_unit: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ExportedModel.load(exported_unit)
    texts = ["the cat", "", "how many ? how many ? how many", "paris"]
    expected = predict(model, open_runtime("onnxruntime-cpu", model), texts, 4)[1]
    eager = torch_runtime.TorchRuntime("torch-eager-fp32", tiny_checkpoint, model, "cpu")
    assert numpy.abs(predict(model, eager, texts, 4)[1] - expected).max() < 1e-4
    # What is added to reach the shape of a graph must not be seen; the recording itself needs a GPU.
    monkeypatch.setattr(
        torch_runtime,
        "_Graph",
        lambda network, shape, device: lambda ids, mask: network(ids, attention_mask=mask).logits,
    )
    graphs = torch_runtime.TorchRuntime("torch-graphs-fp32", tiny_checkpoint, model, "cpu")
    assert numpy.abs(predict(model, graphs, texts, 3)[1] - expected).max() < 1e-4


def test_a_killed_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doomed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "broken.py").write_text("raise ValueError('no such weight')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FreshProcessError, match="killed, most likely for want of memory"):
        ask_fresh_process("doomed", {}, 60)
    with pytest.raises(FreshProcessError, match="no reply within"):
        ask_fresh_process("slow", {}, 0.5)
    with pytest.raises(FreshProcessError, match="ValueError: no such weight"):
        ask_fresh_process("broken", {}, 60)


@pytest.mark.gpu
@pytest.mark.parametrize("contender", inventory.TORCH_CONTENDERS)
def test_pytorch_on_a_gpu_agrees_with_the_cpu(
    exported_unit: Path, tiny_checkpoint: Path, tiny_data: Path, contender: str
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a PyTorch built for CUDA")
    texts = pandas.read_parquet(tiny_data / "test.parquet")["text"].tolist()
    results = [
        check(Service(name, str(exported_unit), str(tiny_checkpoint), 1, device), texts, texts)
        for name, device in ((contender, "cuda"), ("torch-eager-fp32", "cpu"))
    ]
    on_gpu, on_cpu = (numpy.asarray(result["probabilities"]) for result in results)
    assert numpy.abs(on_gpu - on_cpu).max() < 0.05


@pytest.mark.gpu
def test_a_whole_check_on_a_gpu(
    exported_unit: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a PyTorch built for CUDA")
    monkeypatch.chdir(tmp_path)
    staging = tmp_path / "staging"
    staging.mkdir()
    inputs = {"model": exported_unit, "checkpoint": tiny_checkpoint, "data": tiny_data}
    record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
    metrics = room.run_deploy_check(
        StageRun("deploy_check", small_params(), inputs, staging, tmp_path / "state", record)
    )
    assert metrics["gpu"] == "present"
    assert metrics["devices"]["gpu"]["status"] == "passed"

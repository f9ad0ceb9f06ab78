from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.artifacts import write_json, write_manifest
from stages.core.errors import UserError
from stages.core.runtimes import (
    EXACT_PRECISION,
    ExportedModel,
    available_runtimes,
    open_runtime,
    precisions,
    predict,
    safe_runtimes,
)

TEXTS = ["the cat", "", "how many ? how many ? how many", "paris " * 200, "\x00\u202e😀 ﷽", "half a pair \ud800", "dog"]


@pytest.fixture(scope="module")
def model(exported_unit: Path) -> ExportedModel:
    return ExportedModel.load(exported_unit)


def test_loads_from_the_unit_or_the_stage_output(exported_copy: Path) -> None:
    from_output = ExportedModel.load(exported_copy)
    from_unit = ExportedModel.load(exported_copy / "model")
    assert from_output.folder == from_unit.folder
    assert from_output.labels == ("animal", "number", "place")
    assert from_output.model_bytes == (exported_copy / "model" / "model.onnx").stat().st_size


def test_texts_become_tokens_cut_at_the_maximum_length(model: ExportedModel) -> None:
    rows = model.encode(["", "cat " * 100])
    assert [len(row) for row in rows] == [2, model.maximum_length]


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_agrees_with_pytorch(model: ExportedModel, tiny_checkpoint: Path, name: str, goal: str) -> None:
    import torch

    from stages.core.checkpoints import load_model, logits_of

    runtime = open_runtime(name, model, goal=goal)
    input_ids = numpy.array([[2, 40, 61, 3], [2, 62, 3, 0]], dtype=numpy.int64)
    attention_mask = numpy.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=numpy.int64)
    batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
    expected = logits_of(load_model(tiny_checkpoint), batch).numpy()
    got = runtime.logits(input_ids, attention_mask)
    assert got.dtype == numpy.float32
    tolerance = 1e-4 if runtime.precision == "f32" else 0.1
    assert numpy.abs(got - expected).max() < tolerance
    many = runtime.logits_many([(input_ids, attention_mask), (input_ids[:1], attention_mask[:1])])
    assert [part.shape for part in many] == [(2, 3), (1, 3)]
    assert numpy.abs(many[0] - got).max() < tolerance


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_streams_and_token_budgets_change_no_answer(model: ExportedModel, name: str) -> None:
    expected = predict(model, open_runtime(name, model), TEXTS * 5, batch_size=1)[1]
    runtime = open_runtime(name, model, threads=1, goal="throughput", streams=3)
    tolerance = 1e-5 if runtime.precision == "f32" else 0.05
    for batch_tokens in (1, 30, 1000):
        got = predict(model, runtime, TEXTS * 5, batch_tokens=batch_tokens)[1]
        assert numpy.abs(got - expected).max() < tolerance


def test_openvino_computes_in_the_precision_asked_for(model: ExportedModel) -> None:
    offered = precisions("openvino-cpu")
    assert offered[0] == EXACT_PRECISION
    exact = predict(model, open_runtime("onnxruntime-cpu", model), TEXTS, 2)[1]
    for precision in offered:
        runtime = open_runtime("openvino-cpu", model, precision=precision)
        assert runtime.precision == precision
        tolerance = 1e-5 if precision == EXACT_PRECISION else 0.05
        assert numpy.abs(predict(model, runtime, TEXTS, 2)[1] - exact).max() < tolerance


def test_a_precision_that_a_runtime_does_not_offer_is_refused(model: ExportedModel) -> None:
    assert precisions("onnxruntime-cpu") == [None]
    with pytest.raises(UserError, match=r"onnxruntime-cpu: cannot compute in bf16 here; its own"):
        open_runtime("onnxruntime-cpu", model, precision="bf16")
    with pytest.raises(UserError, match=r"openvino-cpu: cannot compute in f8 here; f32"):
        open_runtime("openvino-cpu", model, precision="f8")


def test_int8_avoids_runtimes_that_saturate(model: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = replace(model, quantized=True)
    monkeypatch.setattr("stages.core.runtimes.saturates_here", lambda: True)
    assert "openvino-cpu" not in safe_runtimes(quantized)
    assert "onnxruntime-cpu" in safe_runtimes(quantized)
    safe = predict(quantized, open_runtime("onnxruntime-cpu", quantized), TEXTS, 2)[1]
    assert numpy.abs(safe - predict(model, open_runtime("onnxruntime-cpu", model), TEXTS, 2)[1]).max() < 1e-5
    assert safe_runtimes(model) == available_runtimes()
    assert safe_runtimes(replace(quantized, weight_bits=8)) == safe_runtimes(quantized)
    assert safe_runtimes(replace(quantized, weight_bits=7)) == available_runtimes()
    monkeypatch.setattr("stages.core.runtimes.saturates_here", lambda: False)
    assert safe_runtimes(quantized) == available_runtimes()


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_every_text_gets_an_answer_in_order(model: ExportedModel, name: str) -> None:
    runtime = open_runtime(name, model, goal="throughput")
    labels, probabilities = predict(model, runtime, TEXTS, batch_size=3)
    assert probabilities.shape == (len(TEXTS), 3)
    assert numpy.isfinite(probabilities).all()
    for text, label, row in zip(TEXTS, labels, probabilities, strict=True):
        alone = predict(model, runtime, [text], batch_size=1)[1][0]
        assert numpy.abs(alone - row).max() < (1e-4 if runtime.precision == "f32" else 0.05)
        assert label == row.argmax()


def test_no_texts_give_no_answers(model: ExportedModel) -> None:
    labels, probabilities = predict(model, open_runtime("onnxruntime-cpu", model), [], batch_size=4)
    assert labels.shape == (0,)
    assert probabilities.shape == (0, 3)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=9), batch_size=st.integers(1, 10))
def test_batching_never_changes_an_answer(model: ExportedModel, texts: list[str], batch_size: int) -> None:
    runtime = open_runtime("onnxruntime-cpu", model)
    together = predict(model, runtime, texts, batch_size)[1]
    alone = numpy.concatenate([predict(model, runtime, [text], 1)[1] for text in texts])
    assert numpy.abs(together - alone).max() < 1e-4
    assert numpy.allclose(together.sum(axis=1), 1.0, atol=1e-5)


def test_a_truncated_onnx_file_is_named(exported_copy: Path) -> None:
    path = exported_copy / "model" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.onnx: has \d+ bytes where manifest\.json says"):
        ExportedModel.load(exported_copy)


def test_an_altered_onnx_file_is_named(exported_copy: Path) -> None:
    path = exported_copy / "model" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx: was altered"):
        ExportedModel.load(exported_copy)


def test_a_lost_onnx_file_is_named(exported_copy: Path) -> None:
    (exported_copy / "model" / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model\.onnx: is missing"):
        ExportedModel.load(exported_copy)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_a_file_that_is_no_model_gives_one_line(exported_copy: Path, name: str) -> None:
    (exported_copy / "model" / "model.onnx").write_bytes(b"not a model")
    write_manifest(exported_copy / "model")
    with pytest.raises(UserError, match=rf"model\.onnx: {name} cannot load it") as problem:
        open_runtime(name, ExportedModel.load(exported_copy))
    assert "\n" not in str(problem.value)


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ExportedModel.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no exported model"):
        ExportedModel.load(tmp_path)


def test_another_task_is_refused(exported_copy: Path) -> None:
    path = exported_copy / "model" / "headroom.json"
    write_json(path, {**json.loads(path.read_text()), "task": "sequence-to-sequence"})
    write_manifest(path.parent)
    with pytest.raises(UserError, match=r"headroom\.json: task 'sequence-to-sequence'"):
        ExportedModel.load(exported_copy)


def test_unknown_runtimes_are_refused_with_the_choices(model: ExportedModel) -> None:
    assert available_runtimes()[:2] == ["onnxruntime-cpu", "openvino-cpu"]
    with pytest.raises(UserError, match="onnxruntime-cpu, openvino-cpu"):
        open_runtime("tensorflow", model)


def test_serving_needs_neither_pytorch_nor_transformers(exported_unit: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stages.core.runtimes import *\n"
        f"model = ExportedModel.load(Path({str(exported_unit)!r}))\n"
        "predict(model, open_runtime('openvino-cpu', model), ['the cat'], 1)\n"
        "predict(model, open_runtime('onnxruntime-cpu', model), ['the cat'], 1)\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_gpu_runtimes_agree_with_the_cpu(
    model: ExportedModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in available_runtimes():
        pytest.skip(f"{name} is not installed: needs onnxruntime-gpu and an NVIDIA GPU")
    monkeypatch.chdir(tmp_path)
    expected = predict(model, open_runtime("onnxruntime-cpu", model), TEXTS, 4)[1]
    got = predict(model, open_runtime(name, model), TEXTS, 4)[1]
    assert numpy.abs(got - expected).max() < 0.02


def test_ctrl_c_still_arrives_after_models_were_closed_in_the_order_they_were_opened(exported_unit: Path) -> None:
    """In a process of its own: a stack for signals that was freed kills it."""
    code = (
        "import os, signal, sys; from pathlib import Path; from stages.core.runtimes import *\n"
        "model = ExportedModel.load(Path(sys.argv[1]))\n"
        "first, second = (open_runtime('openvino-cpu', model) for _ in range(2))\n"
        "del first; del second\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); signal.pause()\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(exported_unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr

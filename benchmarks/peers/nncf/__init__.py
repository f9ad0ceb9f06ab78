"""OpenVINO, alone and with NNCF's post-training quantization.

https://docs.openvino.ai: `nncf.quantize` with `model_type=TRANSFORMER` (which turns SmoothQuant on) on 300 texts, the
documented default; compiled with the hint for latency or throughput.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.running import OpenVinoService, export_onnx, feed_by_name
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task

_CALIBRATION_TEXTS = 300
_MODEL = "model.xml"


def compress(variant: str, task: Task, out: Path) -> None:
    """Make `fp32` (weights as they are), or `int8`."""
    import nncf
    import openvino

    out.mkdir(parents=True, exist_ok=True)
    exported = out / "exported.onnx"
    export_onnx(task.checkpoint, exported)
    model: Any = openvino.convert_model(exported)
    if variant == "int8":
        names = [given.get_any_name() for given in model.inputs]
        feeds = [feed_by_name(names, *batch) for batch, _ in task.batches(1, _CALIBRATION_TEXTS)]
        model = nncf.quantize(
            model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=_CALIBRATION_TEXTS
        )
    openvino.save_model(model, out / _MODEL, compress_to_fp16=False)
    exported.unlink()


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load what `compress` made; `bf16` and `fp32` fix the arithmetic of float layers, `int8` leaves it open."""
    return OpenVinoService(folder / _MODEL, goal, threads, {"fp32": "f32", "bf16": "bf16"}.get(variant))

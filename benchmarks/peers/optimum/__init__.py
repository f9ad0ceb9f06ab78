"""Hugging Face Optimum on ONNX Runtime: its export, its optimization levels O1 to O3, its int8 for AVX512-VNNI.

https://huggingface.co/docs/optimum-onnx/onnxruntime/usage_guides/optimization and .../quantization. O4 is O3 in half
precision, which Optimum refuses without a GPU.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.running import OnnxService
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task


def compress(variant: str, task: Task, out: Path) -> None:
    """Make `fp32`, `O1` to `O3`, or `int8` (dynamic, AVX512-VNNI, as its guide's first example)."""
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig

    model = ORTModelForSequenceClassification.from_pretrained(task.checkpoint, export=True)
    if variant == "fp32":
        model.save_pretrained(out)
    elif variant == "int8":
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(model).quantize(save_dir=out, quantization_config=config)
    else:
        config = AutoOptimizationConfig.with_optimization_level(variant)
        ORTOptimizer.from_pretrained(model).optimize(save_dir=out, optimization_config=config)


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load what `compress` made."""
    (path,) = folder.glob("*.onnx")
    return OnnxService(path, threads)

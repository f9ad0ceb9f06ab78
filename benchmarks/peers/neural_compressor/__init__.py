"""Intel Neural Compressor, post-training int8 of an ONNX model, static and dynamic, with its default settings.

2.6 is its last version with an ONNX backend on PyPI; from 3.0 on that part lives in a project of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from benchmarks.peers.running import OnnxService, export_onnx
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task

_CALIBRATION_TEXTS = 128
_MODEL = "model.onnx"


class _Calibration:
    """The loader that Neural Compressor asks for: batches in the order of the graph's inputs, and labels."""

    batch_size = 1

    def __init__(self, task: Task):
        self._task = task

    def __iter__(self) -> Iterator[tuple[tuple[numpy.ndarray, numpy.ndarray], numpy.ndarray]]:
        yield from self._task.batches(self.batch_size, _CALIBRATION_TEXTS)


def compress(variant: str, task: Task, out: Path) -> None:
    """Make `static` or `dynamic`."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    out.mkdir(parents=True, exist_ok=True)
    exported = out / "exported.onnx"
    export_onnx(task.checkpoint, exported)
    config = PostTrainingQuantConfig(approach=variant, calibration_sampling_size=[_CALIBRATION_TEXTS])
    loader = _Calibration(task) if variant == "static" else None
    quantized: Any = quantization.fit(str(exported), config, calib_dataloader=loader)
    if quantized is None:
        raise RuntimeError("Neural Compressor gave no model back")
    quantized.save(str(out / _MODEL))
    exported.unlink()


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load what `compress` made."""
    return OnnxService(folder / _MODEL, threads)

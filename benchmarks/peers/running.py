"""Runners that several peers share. Each imports its runtime only when it opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.peers.service import Array, Batch


class OnnxService:
    """ONNX Runtime on the CPU, all graph optimizations on, as it comes."""

    def __init__(self, path: Path, threads: int | None):
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute logits, float32 [batch, labels], of batches of int64 [batch, length] ids and masks."""
        return [self._session.run(None, feed_by_name(self._names, *batch))[0] for batch in batches]


class OpenVinoService:
    """OpenVINO on the CPU with the hint that its documentation names for the goal; many batches go in side by side."""

    def __init__(self, path: Path, goal: str, threads: int | None, precision: str | None = None):
        import openvino

        settings: dict[str, Any] = {"PERFORMANCE_HINT": goal.upper()}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(path), "CPU", settings)
        self._queue = openvino.AsyncInferQueue(self._compiled)
        self._names = [given.get_any_name() for given in self._compiled.inputs]

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute logits, float32 [batch, labels], of batches of int64 [batch, length] ids and masks."""
        results: list[Array] = [numpy.empty(0)] * len(batches)

        def keep(request: Any, index: int) -> None:
            results[index] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        for index, batch in enumerate(batches):
            self._queue.start_async(feed_by_name(self._names, *batch), index, share_inputs=True)
        self._queue.wait_all()
        return results


class TorchService:
    """A PyTorch module that takes ids and mask."""

    def __init__(self, module: Any, threads: int | None):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        self._module = module

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute logits, float32 [batch, labels], of batches of int64 [batch, length] ids and masks."""
        torch = self._torch
        results = []
        with torch.inference_mode():
            for input_ids, mask in batches:
                output = self._module(torch.from_numpy(input_ids), torch.from_numpy(mask))
                logits = output if isinstance(output, torch.Tensor) else output[0]
                results.append(logits.float().numpy())
        return results


def feed_by_name(names: Sequence[str], input_ids: Array, mask: Array) -> dict[str, Array]:
    """Give a graph the inputs that it names; exporters differ in whether they keep the segment ids."""
    given = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": numpy.zeros_like(input_ids)}
    return {name: given[name] for name in names}


def export_onnx(checkpoint: Path, path: Path) -> None:
    """Export a checkpoint with PyTorch's exporter, batch and length dynamic, for peers that start from ONNX."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    example = torch.ones(2, 16, dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    torch.onnx.export(
        model,
        (example, example),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )

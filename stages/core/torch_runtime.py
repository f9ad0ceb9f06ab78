"""PyTorch as a runtime of the exported file: `torch-eager` and `torch-compiled`, on the CPU.

Imported only where one of them is named: serving with the other runtimes needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch

from stages.core.runtimes import COMPILED, EXACT_PRECISION, Array, Batch, ExportedModel, Goal
from stages.core.torch_graph import torch_module

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_LENGTH_TO_COMPILE = 7


class TorchRuntime:
    """An exported graph in PyTorch.

    Args:
        name: torch-eager or torch-compiled.
        model: to load.
        threads: to compute with, one batch at a time; None leaves it to PyTorch.
        goal: compiled for one text, or for several; the other case would be compiled when it first comes.
        precision: of float arithmetic; None is the exact one.

    Raises:
        UserError: if the graph has an operator that PyTorch is not taught here.
        RuntimeError: if it cannot be compiled.
    """

    def __init__(self, name: str, model: ExportedModel, threads: int | None, goal: Goal, precision: str | None):
        self.name = name
        self.precision = precision or EXACT_PRECISION
        self._threads = threads
        graph = onnx.load(model.onnx_path)
        self._module: Any = torch_module(graph, model.inputs, _TYPES[self.precision])
        if name == COMPILED:
            self._module = torch.compile(self._module, dynamic=True)
            texts = 1 if goal == "latency" else 2
            ids = torch.ones(texts, _LENGTH_TO_COMPILE, dtype=torch.int64).numpy()
            self.logits(ids, ids)  # compiles now, so that what fails fails here

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """Compute logits, float32 [batch, labels], of int64 [batch, length] inputs."""
        with torch.inference_mode(), _threads(self._threads):
            output = self._module(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))
        result: Array = output.float().numpy()
        return result

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute the logits of several batches, one after the other."""
        return [self.logits(*batch) for batch in batches]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch has one number of threads for the whole process; others that use it get theirs back."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The float checkpoint in PyTorch on a GPU: eager, compiled, or replayed as CUDA graphs, in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.checkpoints import load_model
from stages.core.metrics import Array
from stages.core.runtimes import Batch, ExportedModel

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_LENGTH_STEP = 16
_WARM_UP_CALLS = 3


class TorchRuntime:
    """A checkpoint behind the protocol of the runtimes.

    Args:
        name: `torch-MODE-PRECISION`; mode eager, compiled or graphs, precision fp16, bf16 or fp32.
        checkpoint: folder of the model.
        model: whose padding and maximum length are used.
        device: cuda, or cpu for the reference.
    """

    def __init__(self, name: str, checkpoint: Path, model: ExportedModel, device: str):
        _, mode, precision = name.split("-")
        self.name = name
        self.precision = precision
        self._device = torch.device(device)
        self._pad_id = model.pad_id
        self._maximum_length = model.maximum_length
        network: Any = load_model(checkpoint).to(self._device, _TYPES[precision])
        self._network = torch.compile(network, dynamic=True) if mode == "compiled" else network
        self._graphs: dict[tuple[int, int], _Graph] | None = {} if mode == "graphs" else None

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """Compute logits, float32 [batch, labels], of int64 [batch, length] inputs."""
        with torch.inference_mode():
            ids, mask = torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
            output = self._forward(ids, mask) if self._graphs is None else self._replay(ids, mask)
            result: Array = output.float().cpu().numpy()
        return result

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute the logits of several batches, one after the other."""
        return [self.logits(*batch) for batch in batches]

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = self._network(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
        return output

    def _replay(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A graph has one shape, so inputs grow to the next of few; what is added is masked or cut off again."""
        assert self._graphs is not None
        rows, length = ids.shape
        shape = (_power_of_two(rows), max(length, min(_next_step(length), self._maximum_length)))
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(self._network, shape, self._device)
        wide_ids = torch.full(shape, self._pad_id)
        wide_mask = torch.zeros(shape, dtype=torch.int64)
        wide_mask[:, 0] = 1  # a row without a single token would divide by zero
        wide_ids[:rows, :length], wide_mask[:rows, :length] = ids, mask
        return self._graphs[shape](wide_ids, wide_mask)[:rows]


class _Graph:
    """The kernels of one forward pass of one shape, recorded once and launched together."""

    def __init__(self, network: Any, shape: tuple[int, int], device: torch.device):
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._mask = torch.ones(shape, dtype=torch.int64, device=device)
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which must not be recorded
            for _ in range(_WARM_UP_CALLS):
                network(input_ids=self._ids, attention_mask=self._mask)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = network(input_ids=self._ids, attention_mask=self._mask).logits

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._mask.copy_(mask)
        self._graph.replay()
        output: Tensor = self._output
        return output


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _next_step(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP

"""Where the time of a training step goes, by kind of operation, as PyTorch's profiler sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

OTHER = "other operations"
_KINDS = (
    ("optimizer and clipping", ("adam", "optimizer", "_foreach", "linalg_vector_norm", "clip_grad")),
    ("attention", ("scaled_dot_product", "flash_attention", "bmm", "flex_attention")),
    ("embedding", ("embedding",)),
    ("loss", ("log_softmax", "nll_loss", "cross_entropy")),
    ("softmax, layer norm, GELU, dropout", ("softmax", "layer_norm", "gelu", "dropout", "bernoulli")),
    ("matrix products", ("addmm", "aten::mm", "matmul", "linear", "mkldnn", "gemm")),
    ("copies and casts", ("copy", "aten::to", "contiguous", "clone", "aten::cat", "fill_", "zero", "empty")),
    ("choosing positions", ("index", "nonzero", "gather", "scatter", "masked")),
    ("sums and elementwise", ("aten::sum", "aten::add", "aten::mul", "aten::div", "aten::tanh")),
)
KINDS = (*(kind for kind, _ in _KINDS), OTHER)


def kind_of(operation: str) -> str:
    """Kind of an operation by its name; the first kind that knows part of the name has it."""
    name = operation.lower()
    return next((kind for kind, parts in _KINDS if any(part in name for part in parts)), OTHER)


def seconds_by_kind(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add up the seconds of operations, each with its name and what it took by itself, by kind."""
    total = dict.fromkeys(KINDS, 0.0)
    for name, seconds in entries:
        total[kind_of(name)] += seconds
    return total


class StepProfile:
    """The profile of some steps, told for one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By kind, counted by the operations themselves, so that those of several threads add up."""
        self.operations: dict[str, float] = {}
        """The dearest ones, by name."""
        self._profile: Any = None

    def start(self) -> None:
        """Begin to record."""
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.start()

    def stop(self, steps: int) -> None:
        """End recording and add up; so many steps were recorded."""
        self._profile.stop()
        entries = [(entry.key, entry.self_cpu_time_total / 1e6 / steps) for entry in self._profile.key_averages()]
        self.seconds = seconds_by_kind(entries)
        self.operations = dict(sorted(entries, key=lambda entry: -entry[1])[:12])

"""The loss compiled by `torch.compile`, and what that gains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_REPEATS = 3


def compile_loss(loss: nn.Module, run_step: Callable[[Any], object]) -> tuple[Any, dict[str, float]]:
    """Compile a loss module and compare it with itself as it was.

    Only the call is compiled: names of weights, and what is saved, stay as they are. Lengths of batches vary, so
    shapes are symbols from the start. What `run_step` draws by chance and the gradients it leaves are undone.

    Args:
        loss: of a batch.
        run_step: forward and backward of one batch through a loss.

    Returns:
        the compiled loss; and seconds to compile, steps a second before and after.
    """
    compiled = torch.compile(loss, dynamic=True)
    with torch.random.fork_rng():
        before = _step_seconds(loss, run_step)
        started = time.perf_counter()
        run_step(compiled)
        spent = time.perf_counter() - started
        after = _step_seconds(compiled, run_step)
    loss.zero_grad(set_to_none=True)
    return compiled, {"compile_seconds": spent - after, "eager_steps": 1.0 / before, "compiled_steps": 1.0 / after}


def _step_seconds(loss: Any, run_step: Callable[[Any], object]) -> float:
    """Seconds of the fastest of some steps, after one that warms up."""
    run_step(loss)
    spent = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run_step(loss)
        spent.append(time.perf_counter() - started)
    return min(spent)

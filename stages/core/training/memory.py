"""What is done when a training step runs out of memory: the same batch again, in micro-batches half the size."""

from __future__ import annotations

import torch

from stages.core.errors import UserError
from stages.core.training.recipe import Position, Tensors, count_examples

_CPU_IS_FULL = "can't allocate memory"  # torch has a type of error for a full GPU, and these words for the CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error of a device or a system that has no memory left from every other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_IS_FULL in str(error)


def halve_micro_batches(position: Position, tensors: Tensors) -> None:
    """Cut every batch into twice as many micro-batches from here on.

    Raises:
        UserError: if a micro-batch is one example.
    """
    if count_examples(tensors) <= position.parts:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise UserError(
            f"step {position.step}: one example at a time is still too large for the memory of this machine "
            f"(batch: {shapes}); take a smaller model or shorter texts"
        )
    position.parts *= 2
    torch.cuda.empty_cache()

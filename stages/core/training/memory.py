"""Memory: a budget that is kept from the start, and what is done when the memory runs out all the same.

Under a budget there are first more micro-batches, which cost little, and then activations are computed twice (Chen et
al., 1604.06174), which costs about a third more arithmetic. When a step runs out of memory the same batch is done
again, in micro-batches half the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.params import TrainingParams
from stages.core.structure import outermost
from stages.core.training.recipe import Position, Tensors, count_examples

_COPIES = 3
"""Of the trained weights beside themselves: gradients, and two moments, as Adam has."""
_MEBI = 2**20
_CPU_IS_FULL = "can't allocate memory"  # torch has a type of error for a full GPU, and these words for the CPU


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Run a forward pass and count what it keeps for the backward pass; the generator is left as it was.

    A tensor that several operations keep counts once; weights, which are there anyway, are counted as well.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


@contextmanager
def fitted_to_memory(
    model: nn.Module, params: TrainingParams, examples: int, needed: Callable[[int], int], kept: int = 0
) -> Iterator[int]:
    """Choose how a batch is trained under the budget.

    Args:
        model: whose activations may be computed twice; on leaving it keeps them as it did.
        params: budget, and whether activations must or may be computed twice.
        examples: of a batch; more micro-batches there cannot be.
        needed: bytes that the first of so many micro-batches keeps for its backward pass.
        kept: copies of all weights that the run keeps, such as the best ones so far.

    Yields:
        into how many micro-batches a batch is cut.

    Raises:
        UserError: if nothing fits, or the model cannot compute activations twice though the params want it.
    """
    ways = {"auto": (False, True), True: (True,), False: (False,)}[params.activation_checkpointing]
    room = _room(model, params, kept)
    least = 0
    for twice in ways:
        with checkpointed(model, twice):
            parts = 1
            while room is not None and (least := needed(parts)) > room and parts < examples:
                parts = min(2 * parts, examples)
            if room is None or least <= room:
                yield parts
                return
    weights = (params.memory_budget_mb or 0) - (room or 0) / _MEBI
    raise UserError(
        f"params.yaml: training.memory_budget_mb: {params.memory_budget_mb}, weights and optimizer take "
        f"{weights:.0f} MB and the smallest micro-batch {least / _MEBI:.0f} MB; raise it or lower batch_tokens"
    )


def _room(model: nn.Module, params: TrainingParams, kept: int) -> float | None:
    """Bytes that the budget leaves for activations."""
    if params.memory_budget_mb is None:
        return None
    weights = sum(_size(part) for part in model.parameters())
    trained = sum(_size(part) for part in model.parameters() if part.requires_grad)
    return params.memory_budget_mb * _MEBI - (1 + kept) * weights - _COPIES * trained


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only the inputs of each layer, and compute the rest again in the backward pass."""
    if not wanted:
        yield
        return
    found: list[Any] = outermost(model)
    if not found or not all(each.supports_gradient_checkpointing for each in found):
        raise UserError(
            "params.yaml: training.activation_checkpointing: this architecture cannot compute activations twice; "
            "set it to false"
        )
    for each in found:
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        for each in found:
            each.gradient_checkpointing_disable()


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

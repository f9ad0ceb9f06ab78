"""What is done when a training step goes wrong.

A bad step is skipped. After `skips` in a row the run goes back to the last good saved state, learns at a lower rate
from there on and passes over the batches that were bad. After `rollbacks` ways back it stops, with the batch on disk
for inspection. A step that runs out of memory is no bad step: it is done again in micro-batches half the size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from stages.core.artifacts import write_json
from stages.core.params import FaultParams
from stages.core.training.recipe import Batch, Faults, Position, Tensors

_OUT_OF_MEMORY = "can't allocate memory"  # torch has a type for a GPU that is full, and these words for the CPU


@dataclass(frozen=True)
class Step:
    """What a step came to, before its gradients are used."""

    loss: float
    gradient_norm: float
    """Before clipping."""


def find_fault(step: Step, faults: Faults, params: FaultParams, scaled: bool) -> str | None:
    """Say what is wrong with a step; None where nothing is.

    Args:
        step: what it came to.
        faults: what went before.
        params: the policy.
        scaled: whether a loss scaler for fp16 is at work: norms that are not finite are its business then.
    """
    if not math.isfinite(step.loss):
        return f"the loss is {step.loss}"
    if not math.isfinite(step.gradient_norm) and not scaled:
        return f"the gradient norm is {step.gradient_norm}"
    if params.spike is None or len(faults.recent) < params.window:
        return None
    usual = statistics.median(faults.recent)
    if step.loss > max(params.spike * usual, faults.first_highest):
        return f"the loss of {step.loss:.4g} is a spike over the usual {usual:.4g}"
    return None


def remember_good_step(faults: Faults, loss: float, window: int) -> None:
    """Note the loss of a step that was taken."""
    if len(faults.recent) < window:
        faults.first_highest = max(faults.first_highest, loss)
    faults.recent = [*faults.recent, loss][-window:]
    faults.in_a_row, faults.rolled_back_to = 0, None


def remember_bad_step(faults: Faults, round_: int, batch: int) -> None:
    """Note a step that was skipped."""
    faults.in_a_row += 1
    faults.bad_batches.append([round_, batch])


def is_good_state(position: Position, faults: Faults) -> bool:
    """Tell whether a saved state is one to roll back to.

    Not one from a run of bad steps; and where nothing was learnt since the last way back, one from further back.
    """
    limit = faults.rolled_back_to
    return position.faults.in_a_row == 0 and (limit is None or position.step < limit)


def after_rollback(restored: Position, failed: Position, rate_factor: float) -> Position:
    """The position of a restored state, with what was learnt about faults, memory and the curves since it was saved."""
    faults = replace(
        failed.faults,
        in_a_row=0,
        rollbacks=failed.faults.rollbacks + 1,
        rate=failed.faults.rate * rate_factor,
        rolled_back_to=restored.step,
        recent=restored.faults.recent,
        first_highest=restored.faults.first_highest,
    )
    return replace(restored, faults=faults, parts=failed.parts, history=failed.history)


def write_evidence(folder: Path, tensors: Tensors, batch: Batch, step: Step, position: Position) -> Path:
    """Write the batch of a bad step for inspection.

    Returns:
        the file of its tensors; beside it lies JSON that says where it stood, its rows, loss and gradient norm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bad-batch.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    description = {
        "step": position.step,
        "round": position.round,
        "batch": position.batch,
        "rows": list(batch),
        "loss": _number(step.loss),
        "gradient_norm": _number(step.gradient_norm),
        "rate": position.faults.rate,
        "bad_batches": position.faults.bad_batches,
    }
    write_json(path.with_suffix(".json"), description)
    return path


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error of a device or a system that has no memory left from every other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY in str(error)


def can_be_halved(tensors: Mapping[str, torch.Tensor], parts: int) -> bool:
    """Tell whether a micro-batch has more than one example when a batch is cut into so many parts."""
    return len(next(iter(tensors.values()))) > parts


def _number(value: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else str(value)

"""What is done when a training step goes wrong.

A bad step is skipped. After `skips` in a row the run goes back to the last good saved state, learns at a lower rate
from there on and passes over the batches that were bad. After `rollbacks` ways back it stops, with the batch on disk
for inspection.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.launch import is_first_process
from stages.core.params import FaultParams
from stages.core.training.recipe import Batch, Faults, Position, Tensors


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


def stop_where_it_persists(
    fault: str, step: Step, batch: Batch, tensors: Tensors, position: Position, params: FaultParams, folder: Path
) -> None:
    """End a run that no skip and no way back has helped.

    Raises:
        UserError: naming the file that the batch was written to.
    """
    faults = position.faults
    if faults.in_a_row < params.skips or faults.rollbacks < params.rollbacks:
        return
    path = folder / "bad-batch.safetensors"
    if is_first_process():  # all have the whole batch
        _write_evidence(path, step, batch, tensors, position)
    raise UserError(
        f"step {position.step}: {fault}, after {faults.rollbacks} ways back to a saved state and at {faults.rate:.3g} "
        f"of the learning rate; look at the batch in {path}, or lower the learning rate"
    )


def _write_evidence(path: Path, step: Step, batch: Batch, tensors: Tensors, position: Position) -> None:
    """Write the batch of a bad step: its tensors, and beside them in JSON its rows and what the step came to."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def _number(value: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else str(value)

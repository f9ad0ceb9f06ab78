"""Ranges of activations from calibration texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import logits_of
from stages.core.params import ActivationParams
from stages.core.quantized import ActivationRange, quantize
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 32
_VALUES_PER_LAYER = 1_000_000
_SHRINKING_STEPS = 60


def collect_inputs(
    model: nn.Module, names: Sequence[str], rows: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """Record what flows into layers.

    Args:
        model: in evaluation mode.
        names: of linear layers.
        rows: token ids of the calibration texts.
        pad_id: token id that fills short texts; what flows at filled positions is left out.

    Returns:
        for each layer the values seen, flat; a regular sample where there are very many.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.zeros(0, dtype=torch.bool)

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach()
            seen[name].append(values[mask] if values.dim() == 3 else values)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    try:
        for batch in length_batches([len(row) for row in rows], _BATCH_SIZE):
            inputs = pad_tensors([rows[i] for i in batch], pad_id)
            mask = inputs["attention_mask"].bool()
            logits_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _thin(torch.cat([part.flatten() for part in parts])) for name, parts in seen.items()}


def choose_range(values: Tensor, params: ActivationParams) -> ActivationRange:
    """Choose the range to represent, by the observer that params name."""
    observers: dict[str, Any] = {"minmax": _minmax, "percentile": _percentile, "mse": _least_squared_error}
    low, high = observers[params.observer](values, params.percentile)
    return ActivationRange.covering(low, high)


def _minmax(values: Tensor, _: float) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _percentile(values: Tensor, percentile: float) -> tuple[float, float]:
    ordered = values.sort().values
    last = len(ordered) - 1
    return float(ordered[round(last * (1 - percentile / 100))]), float(ordered[round(last * percentile / 100)])


def _least_squared_error(values: Tensor, _: float) -> tuple[float, float]:
    """Shrink the min-max range step by step and keep the one with the least error of rounding and clipping."""
    low, high = _minmax(values, 0.0)
    sample = values[:: max(1, len(values) // 100_000)]

    def error(share: float) -> float:
        chosen = ActivationRange.covering(low * share, high * share)
        return float((quantize(sample, chosen) - sample).square().mean())

    best = min((1.0 - step / (_SHRINKING_STEPS + 20) for step in range(_SHRINKING_STEPS)), key=error)
    return low * best, high * best


def _thin(values: Tensor) -> Tensor:
    """Keep the extremes and a regular sample."""
    if len(values) <= _VALUES_PER_LAYER:
        return values
    step = -(-len(values) // _VALUES_PER_LAYER)
    return torch.cat([values[::step], values.min()[None], values.max()[None]])

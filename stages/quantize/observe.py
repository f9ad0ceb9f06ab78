"""Ranges of activations from calibration texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import logits_of
from stages.core.params import ActivationParams
from stages.core.quantized import ACTIVATION_LEVELS, ActivationRange, quantize
from stages.core.tensors import pad_tensors

_BATCH_SIZE = 32
_TOKENS_PER_LAYER = 2048
_VALUES_FOR_ERROR = 100_000
_SHRINKING_STEPS = 60
_BINS = 2048
_SMALLEST = 1e-9


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
        for each layer a regular sample of what it saw, [tokens, in features], with the tokens that hold the extremes.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.zeros(0, dtype=torch.bool)

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach()
            seen[name].append(_thin(values[mask] if values.dim() == 3 else values))

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
    return {name: _thin(torch.cat(parts)) for name, parts in seen.items()}


def choose_range(values: Tensor, params: ActivationParams) -> ActivationRange:
    """Choose the range to represent, by the observer that params name.

    Args:
        values: of any shape.
        params: observer and percentile.
    """
    flat = values.flatten()
    if params.observer == "minmax":
        return ActivationRange.covering(*_minmax(flat))
    if params.observer == "percentile":
        return ActivationRange.covering(*_percentile(flat, params.percentile))
    return _shrink(flat, _squared_error if params.observer == "mse" else _lost_information)


def _minmax(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _percentile(values: Tensor, percentile: float) -> tuple[float, float]:
    ordered = values.sort().values
    last = len(ordered) - 1
    return float(ordered[round(last * (1 - percentile / 100))]), float(ordered[round(last * percentile / 100)])


def _shrink(values: Tensor, error: Callable[[Tensor, ActivationRange], float]) -> ActivationRange:
    """Shrink the min-max range step by step and keep the one with the least error of rounding and clipping."""
    low, high = _minmax(values)
    sample = values[:: max(1, len(values) // _VALUES_FOR_ERROR)]
    shares = [1.0 - step / (_SHRINKING_STEPS + 20) for step in range(_SHRINKING_STEPS)]
    return min(
        (ActivationRange.covering(low * share, high * share) for share in shares),
        key=lambda chosen: error(sample, chosen),
    )


def _squared_error(values: Tensor, chosen: ActivationRange) -> float:
    return float((quantize(values, chosen) - values).square().mean())


def _lost_information(values: Tensor, chosen: ActivationRange) -> float:
    """Kullback-Leibler divergence of the values from what is left of them in 8 bits (2004.09602, section 4.1).

    Both are histograms over the values' own range: what is clipped falls into the outermost bins, and each level's
    count is spread evenly over the bins that it stands for and that were not empty.
    """
    low, high = _minmax(values)
    if low == high:
        return 0.0
    least, most = (float(chosen.scale * (end - chosen.zero_point)) for end in (0, ACTIVATION_LEVELS))
    clipped = values.clamp(max(low, least), min(high, most))
    wanted = torch.histc(clipped, _BINS, low, high)
    inside = torch.histc(values[(values >= least) & (values <= most)], _BINS, low, high)
    centres = low + (torch.arange(_BINS) + 0.5) * (high - low) / _BINS
    levels = ((centres / chosen.scale).round() + chosen.zero_point).clamp(0, ACTIVATION_LEVELS).long()
    used = (wanted > 0).float()
    count = torch.zeros(ACTIVATION_LEVELS + 1).index_add_(0, levels, inside)
    bins = torch.zeros(ACTIVATION_LEVELS + 1).index_add_(0, levels, used)
    left = used * (count / bins.clamp(min=1))[levels]
    first, second = wanted / wanted.sum(), left / left.sum().clamp(min=1)
    return float((first * (first.clamp(min=_SMALLEST) / second.clamp(min=_SMALLEST)).log()).sum())


def _thin(rows: Tensor) -> Tensor:
    """Keep a regular sample of tokens, and those with the extremes."""
    if len(rows) <= _TOKENS_PER_LAYER:
        return rows
    step = -(-len(rows) // _TOKENS_PER_LAYER)
    extremes = torch.stack([rows.amin(dim=1).argmin(), rows.amax(dim=1).argmax()])
    return torch.cat([rows[::step], rows[extremes]])

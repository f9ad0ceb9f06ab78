"""Weights in groups of inputs: each group of an output channel has a scale and an integer zero point.

Round to nearest, half-quadratic quantization, and GPTQ. ONNX wants integer zero points, so where HQQ solves for the
zero point, here the scale is solved for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stages.core.params import WeightOnlyParams
from stages.core.quantized import LARGEST_MULTIPLE, round_in_steps

_SMALLEST_SCALE = 1e-8
_SMALLEST_GROUP = 16
_HQQ_NORM = 0.7
_HQQ_ROUNDS = 20
_HQQ_BETA, _HQQ_GROWTH = 10.0, 1.1
_DAMPING = 0.01
_MIDDLE = 8


@dataclass(frozen=True)
class Grouped:
    """Rounded weights."""

    levels: Tensor
    """uint8 [in, out]."""
    zero_point: Tensor
    """uint8 [groups, out]."""
    scale: Tensor
    """float [groups, out]."""

    def dequantize(self) -> Tensor:
        """Return the float weights that the levels stand for, [in, out]."""
        return _dequantize(_split(self.levels.float(), len(self.scale)), self.scale, self.zero_point.float()).flatten(
            0, 1
        )


def group_size(in_features: int, wanted: int) -> int | None:
    """Largest power of two up to `wanted` that divides the inputs; None where not even 16 does."""
    size = wanted
    while size >= _SMALLEST_GROUP and in_features % size:
        size //= 2
    return size if size >= _SMALLEST_GROUP else None


def round_groups(weight: Tensor, inputs: Tensor, bits: int, group: int, params: WeightOnlyParams) -> Grouped:
    """Round weights by the method that params name.

    Args:
        weight: [out, in].
        inputs: that the layer sees, [tokens, in].
        bits: 4 or 8.
        group: inputs that share a scale; divides `in`.
        params: the method.
    """
    if params.method == "hqq":
        return half_quadratic(weight, bits, group)
    if params.method == "gptq":
        return gptq(weight, inputs, bits, group)
    return round_to_nearest(weight, bits, group)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Grouped:
    """Round every weight [out, in] to the nearest level of its group's own range."""
    groups = _split(weight.t(), weight.shape[1] // group)
    scale, zero_point = _grid(groups, bits)
    return _assemble(_levels(groups, scale, zero_point, bits), scale, zero_point)


def half_quadratic(weight: Tensor, bits: int, group: int) -> Grouped:
    """Choose scales for a norm below 1 of the error, which forgives outliers (HQQ, Badri & Shaji 2023).

    The error is split off as a variable of its own, shrunk by the proximal operator of the norm, and the scale is the
    least-squares solution for what remains; the two take turns. A group keeps the best it has seen, so none is worse
    than by rounding to nearest.

    Args:
        weight: [out, in].
        bits: 4 or 8.
        group: inputs that share a scale; divides `in`.
    """
    groups = _split(weight.t(), weight.shape[1] // group)
    scale, zero_point = _grid(groups, bits)
    best, best_error, beta = scale, _norm(groups, scale, zero_point, bits), _HQQ_BETA
    for _ in range(_HQQ_ROUNDS):
        steps = _levels(groups, scale, zero_point, bits) - zero_point[:, None]
        error = _shrink(groups / scale[:, None] - steps, beta) * scale[:, None]
        solved = ((groups - error) * steps).sum(dim=1) / steps.square().sum(dim=1).clamp(min=1.0)
        scale, beta = torch.where(solved > _SMALLEST_SCALE, solved, scale), beta * _HQQ_GROWTH
        now = _norm(groups, scale, zero_point, bits)
        best, best_error = torch.where(now < best_error, scale, best), torch.minimum(now, best_error)
    return _assemble(_levels(groups, best, zero_point, bits), best, zero_point)


def gptq(weight: Tensor, inputs: Tensor, bits: int, group: int) -> Grouped:
    """Round input by input and let the inputs still to come make the error good (GPTQ, 2210.17323).

    An output channel for which that ends worse than rounding to nearest, on these inputs, keeps the latter.

    Args:
        weight: [out, in].
        inputs: that the layer sees, [tokens, in].
        bits: 4 or 8.
        group: inputs that share a scale; divides `in`.
    """
    grid, levels = partial(_grid, bits=bits), partial(_levels, bits=bits)
    solved, nearest = _solve_gptq(weight, inputs, group, grid, levels), round_to_nearest(weight, bits, group)
    return _better_of(solved, nearest, weight, inputs)


def gptq_in_steps(weight: Tensor, inputs: Tensor, group: int, limit: int) -> tuple[Tensor, Tensor]:
    """Round to multiples of whole steps as `round_in_steps` does, with GPTQ making errors good.

    Args:
        weight: in units of each output's scale, [out, in].
        inputs: that the layer sees, [tokens, in].
        group: inputs that share a step; divides `in`.
        limit: no multiple times its step is larger.

    Returns:
        multiples int8 [out, in], steps uint8 [out, in / group].
    """
    solved = _solve_gptq(weight, inputs, group, partial(_step_grid, limit=limit), _step_levels)
    multiples, steps = round_in_steps(weight, group, limit)
    zeros = torch.full_like(solved.zero_point, _MIDDLE)
    nearest = Grouped((multiples.t() + _MIDDLE).to(torch.uint8), zeros, steps.t().float())
    best = _better_of(solved, nearest, weight, inputs)
    return best.levels.t().to(torch.int8) - _MIDDLE, best.scale.t().to(torch.uint8)


def _better_of(solved: Grouped, nearest: Grouped, weight: Tensor, inputs: Tensor) -> Grouped:
    worse = _channel_errors(solved, weight, inputs) > _channel_errors(nearest, weight, inputs)
    return Grouped(
        torch.where(worse, nearest.levels, solved.levels),
        torch.where(worse, nearest.zero_point, solved.zero_point),
        torch.where(worse, nearest.scale, solved.scale),
    )


def _solve_gptq(
    weight: Tensor,
    inputs: Tensor,
    group: int,
    grid: Callable[[Tensor], tuple[Tensor, Tensor]],
    nearest_levels: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Grouped:
    factor = _inverse_factor(inputs)
    left = weight.t().double().clone()
    levels, scales, zero_points = [], [], []
    for start in range(0, len(left), group):
        scale, zero_point = grid(left[start : start + group][None])
        errors = []
        for row in range(start, start + group):
            chosen = nearest_levels(left[row][None, None], scale, zero_point)
            rounded = _dequantize(chosen, scale, zero_point)[0, 0]
            error = (left[row] - rounded) / factor[row, row]
            left[row : start + group] -= factor[row, row : start + group, None] * error
            levels.append(chosen[0, 0])
            errors.append(error)
        later = factor[start : start + group, start + group :]
        left[start + group :] -= later.t() @ torch.stack(errors)
        scales.append(scale[0])
        zero_points.append(zero_point[0])
    return Grouped(
        torch.stack(levels).to(torch.uint8), torch.stack(zero_points).to(torch.uint8), torch.stack(scales).float()
    )


def _inverse_factor(inputs: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment of the inputs, float64 [in, in]."""
    seen = inputs.double()
    moment = seen.t() @ seen
    diagonal = moment.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp(min=_SMALLEST_SCALE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _channel_errors(rounded: Grouped, weight: Tensor, inputs: Tensor) -> Tensor:
    """Squared error of every output channel, [out]."""
    return (inputs @ (rounded.dequantize() - weight.t())).square().sum(dim=0)


def _grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [groups, out], that cover weights [groups, group, out] and, exactly, zero."""
    low, high = groups.amin(dim=1).clamp(max=0.0), groups.amax(dim=1).clamp(min=0.0)
    # ONNX keeps scales in float32.
    scale = ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST_SCALE).float().to(groups.dtype)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _step_grid(groups: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Step and zero point, [1, out], of one group of weights [1, group, out]."""
    _, steps = round_in_steps(groups[0].t(), groups.shape[1], limit)
    scale = steps.t().to(groups.dtype)
    return scale, torch.full_like(scale, _MIDDLE)


def _step_levels(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    multiples = (groups / scale[:, None]).round().clamp(-LARGEST_MULTIPLE, LARGEST_MULTIPLE)
    return multiples + zero_point[:, None]


def _levels(groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return ((groups / scale[:, None]).round() + zero_point[:, None]).clamp(0, 2**bits - 1)


def _dequantize(levels: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (levels - zero_point[:, None]) * scale[:, None]


def _norm(groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Sum of |error|^0.7 of every group, [groups, out]."""
    rounded = _dequantize(_levels(groups, scale, zero_point, bits), scale, zero_point)
    return (groups - rounded).abs().pow(_HQQ_NORM).sum(dim=1)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Proximal operator of the norm (generalized soft thresholding, 1301.3557)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=_SMALLEST_SCALE).pow(_HQQ_NORM - 1.0) / beta).clamp(min=0.0)


def _split(weight: Tensor, groups: int) -> Tensor:
    """[in, out] -> [groups, group, out]."""
    return weight.reshape(groups, -1, weight.shape[1])


def _assemble(levels: Tensor, scale: Tensor, zero_point: Tensor) -> Grouped:
    return Grouped(levels.flatten(0, 1).to(torch.uint8), zero_point.to(torch.uint8), scale)

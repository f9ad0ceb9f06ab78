"""Linear layers in int8, simulated exactly as the ONNX runtimes compute them.

Weights are symmetric int8 with one scale per output channel; activations are unsigned 8 bit with one scale and zero
point per tensor (Jacob et al., 1712.05877). `torch.ops.quantized_decomposed` pairs become QuantizeLinear and
DequantizeLinear in ONNX, which the runtimes fuse into integer matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional

WEIGHT_LIMIT = 127
ACTIVATION_LEVELS = 255
_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True)
class ActivationRange:
    """How float inputs map to 8 bits: level = round(value / scale) + zero_point."""

    scale: float
    zero_point: int

    @classmethod
    def covering(cls, low: float, high: float) -> ActivationRange:
        """Represent [low, high] and, exactly, zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        # ONNX keeps scales in float32; rounding here makes the simulation the same to the bit.
        scale = float(torch.tensor(max((high - low) / ACTIVATION_LEVELS, _SMALLEST_SCALE)))
        return cls(scale, round(min(max(-low / scale, 0.0), ACTIVATION_LEVELS)))


class QuantizedLinear(nn.Module):
    """A linear layer with int8 weights and 8-bit activations."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, activations: ActivationRange | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activations = activations
        """Range fixed by calibration; None takes the range of each input as it comes."""
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def from_linear(cls, linear: nn.Linear, activations: ActivationRange | None) -> QuantizedLinear:
        """Quantize a float layer; `activations` None takes the range of each input as it comes."""
        quantized = cls(linear.in_features, linear.out_features, activations)
        weight = linear.weight.detach()
        quantized.weight_scale = weight_scales(weight)
        quantized.weight = quantize_weight(weight, quantized.weight_scale)
        if linear.bias is not None:
            quantized.bias = linear.bias.detach().clone()
        return quantized

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        seen = quantize_by_own_range(inputs) if self.activations is None else quantize(inputs, self.activations)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.weight_scale, zeros, 0, -WEIGHT_LIMIT, WEIGHT_LIMIT, torch.int8
        )
        return functional.linear(seen, weight, self.bias)


def weight_scales(weight: Tensor) -> Tensor:
    """Scale of each output channel, [out]: the largest weight becomes 127."""
    return (weight.abs().amax(dim=1) / WEIGHT_LIMIT).clamp(min=_SMALLEST_SCALE)


def quantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Round float weights [out, in] to int8 by channel."""
    return (weight / scales[:, None]).round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(torch.int8)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def quantize(inputs: Tensor, activations: ActivationRange) -> Tensor:
    """Round inputs to 8 bits and back."""
    operators = torch.ops.quantized_decomposed
    form = (activations.scale, activations.zero_point, 0, ACTIVATION_LEVELS, torch.uint8)
    levels = operators.quantize_per_tensor(inputs, *form)
    seen: Tensor = operators.dequantize_per_tensor(levels, *form)
    return seen


# An operator of its own, so that export finds it and writes DynamicQuantizeLinear in its place.
@torch.library.custom_op("headroom::quantize_by_own_range", mutates_args=())
def quantize_by_own_range(inputs: Tensor) -> Tensor:
    """Quantize to the tensor's own range and back, with the arithmetic of ONNX's DynamicQuantizeLinear."""
    low = inputs.amin().clamp(max=0.0)
    high = inputs.amax().clamp(min=0.0)
    scale = ((high - low) / ACTIVATION_LEVELS).clamp(min=_SMALLEST_SCALE)
    zero_point = (-low / scale).round().clamp(0, ACTIVATION_LEVELS)
    levels = ((inputs / scale).round() + zero_point).clamp(0, ACTIVATION_LEVELS)
    return (levels - zero_point) * scale


@quantize_by_own_range.register_fake
def _(inputs: Tensor) -> Tensor:
    return torch.empty_like(inputs)

"""Quantized models without their rounding, for gradients."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional

from stages.core.quantized import ACTIVATION_LEVELS, QuantizedLinear, quantized_parts, replace_module


class SmoothLinear(nn.Module):
    """A quantized linear layer with its own int8 weights, whose inputs are held to their range but not rounded."""

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None

    def __init__(self, quantized: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self.register_buffer("weight", quantized.weight.float() * quantized.weight_scale[:, None])
        self.register_buffer("bias", quantized.bias)
        self.register_buffer("input_scale", quantized.input_scale)
        seen = quantized.activations
        self.limits = None
        """Lowest and highest input; None where every input sets a range that holds it all."""
        if seen is not None:
            self.limits = (-seen.zero_point * seen.scale, (ACTIVATION_LEVELS - seen.zero_point) * seen.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        if self.input_scale is not None:
            inputs = inputs * self.input_scale
        if self.limits is not None:
            inputs = inputs.clamp(*self.limits)
        return functional.linear(inputs, self.weight, self.bias)


def smooth_twin(model: nn.Module) -> nn.Module:
    """Copy a model with `SmoothLinear` for its quantized linears; the model itself where it has none.

    Other quantized parts round weights alone, which passes gradients to the inputs as it is.
    """
    rounded = {name: part for name, part in quantized_parts(model).items() if isinstance(part, QuantizedLinear)}
    if not rounded:
        return model
    twin = copy.deepcopy(model)
    for name, part in rounded.items():
        replace_module(twin, name, SmoothLinear(part))
    return twin.eval()

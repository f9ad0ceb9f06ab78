import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stages.core.quantized import ActivationRange, QuantizedLinear, quantize, quantize_by_own_range

bounds = st.floats(-1e4, 1e4, allow_nan=False)


@given(bounds, bounds)
def test_a_range_represents_zero_exactly_and_its_ends_within_half_a_step(one: float, other: float) -> None:
    low, high = sorted((one, other))
    chosen = ActivationRange.covering(low, high)
    assert 0 <= chosen.zero_point <= 255
    assert quantize(torch.zeros(1), chosen).item() == 0.0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    assert (quantize(ends, chosen) - ends).abs().max() <= 1.01 * chosen.scale


def test_weights_on_the_grid_are_exact() -> None:
    linear = nn.Linear(4, 2)
    linear.weight.data = torch.tensor([[127.0, -64.0, 0.0, 1.0], [1.27, 0.01, -1.27, 0.5]])
    quantized = QuantizedLinear.from_linear(linear, None)
    assert quantized.weight.tolist() == [[127, -64, 0, 1], [127, 1, -127, 50]]
    assert quantized.weight_scale.tolist() == pytest.approx([1.0, 0.01])


@pytest.mark.parametrize("activations", [ActivationRange.covering(-3.0, 3.0), None])
def test_output_is_within_the_rounding_error(activations: ActivationRange | None) -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(64, 8), torch.randn(5, 3, 64).clamp(-3, 3)
    quantized = QuantizedLinear.from_linear(linear, activations)
    wanted = linear(inputs)
    assert (quantized(inputs) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_dynamic_range_follows_the_onnx_example() -> None:
    # From the ONNX operator's own documentation: scale 0.0196078438, zero point 153.
    inputs = torch.tensor([0.0, 2.0, -3.0, -2.5, 1.34, 0.5])
    levels = (quantize_by_own_range(inputs) / 0.0196078438).round() + 153
    assert levels.tolist() == [153, 255, 0, 26, 221, 179]


def test_an_input_of_zeros_stays_zero() -> None:
    assert quantize_by_own_range(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]

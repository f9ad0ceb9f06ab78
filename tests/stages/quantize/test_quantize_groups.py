import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.core.quantized import GroupedLinear, round_in_steps
from stages.quantize.groups import (
    Grouped,
    _norm,
    _split,
    gptq,
    gptq_in_steps,
    group_size,
    half_quadratic,
    round_to_nearest,
)


def _layer_error(rounded: Grouped, weight: Tensor, inputs: Tensor) -> Tensor:
    """Squared error of every output channel."""
    return (inputs @ (rounded.dequantize() - weight.t())).square().sum(dim=0)


@pytest.mark.parametrize(("features", "wanted", "size"), [(384, 32, 32), (1520, 128, 16), (40, 32, None), (16, 16, 16)])
def test_groups_divide_the_inputs(features: int, wanted: int, size: int | None) -> None:
    assert group_size(features, wanted) == size


def test_weights_on_the_grid_are_exact() -> None:
    levels = torch.arange(16.0).repeat(2)
    weight = torch.stack([levels * 0.5 - 2.0, levels * 0.25 - 3.0])
    for rounded in (round_to_nearest(weight, 4, 16), half_quadratic(weight, 4, 16)):
        torch.testing.assert_close(rounded.dequantize(), weight.t())
        assert rounded.zero_point.tolist() == [[4, 12], [4, 12]]
        assert rounded.levels[:, 0].tolist() == [*range(16), *range(16)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.sampled_from([16, 32]))
def test_gptq_is_never_worse_than_rounding_in_any_channel(seed: int, bits: int, group: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(6, 64) ** 3
    inputs = torch.randn(100, 64) @ torch.randn(64, 64)
    solved, nearest = gptq(weight, inputs, bits, group), round_to_nearest(weight, bits, group)
    assert (_layer_error(solved, weight, inputs) <= _layer_error(nearest, weight, inputs) * 1.0001).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([63, 127]))
def test_gptq_in_steps_is_never_worse_than_the_best_steps_and_stays_in_range(seed: int, limit: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(6, 64) ** 3
    weight = weight / weight.abs().amax(dim=1, keepdim=True) * limit
    inputs = torch.randn(100, 64) @ torch.randn(64, 64)
    errors = []
    for multiples, steps in (gptq_in_steps(weight, inputs, 16, limit), round_in_steps(weight, 16, limit)):
        assert multiples.abs().max() <= 7
        rounded = multiples.float() * steps.repeat_interleave(16, dim=1)
        assert rounded.abs().max() <= limit
        errors.append((inputs @ (rounded - weight).t()).square().sum(dim=0))
    assert (errors[0] <= errors[1] * 1.0001).all()


def test_gptq_uses_what_inputs_have_in_common() -> None:
    # Two inputs that are always equal: the second weight can make the first one's error good.
    torch.manual_seed(0)
    weight, half = torch.randn(32, 64), torch.randn(400, 32)
    inputs = half.repeat_interleave(2, dim=1)
    solved, nearest = gptq(weight, inputs, 4, 32), round_to_nearest(weight, 4, 32)
    assert _layer_error(solved, weight, inputs).sum() < 0.6 * _layer_error(nearest, weight, inputs).sum()


def test_gptq_is_rounding_to_nearest_where_inputs_have_nothing_in_common() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    assert torch.equal(gptq(weight, torch.eye(32), 4, 16).levels, round_to_nearest(weight, 4, 16).levels)


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 32), torch.randn(50, 32)
    inputs[:, :5] = 0.0
    assert gptq(weight, inputs, 4, 16).dequantize().isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 8]))
def test_half_quadratic_is_never_worse_in_any_group(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(5, 64) ** 3
    errors = [
        _norm(_split(weight.t(), 2), rounded.scale, rounded.zero_point.float(), bits)
        for rounded in (half_quadratic(weight, bits, 32), round_to_nearest(weight, bits, 32))
    ]
    assert (errors[0] <= errors[1] * 1.0001).all()


def test_half_quadratic_gains_where_there_are_outliers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    weight[:, ::32] *= 6
    errors = [
        float((rounded.dequantize() - weight.t()).abs().pow(0.7).mean())
        for rounded in (half_quadratic(weight, 4, 32), round_to_nearest(weight, 4, 32))
    ]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_computes_with_the_weights_its_levels_stand_for(bits: int) -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(48, 7), torch.randn(2, 3, 48)
    rounded = round_to_nearest(linear.weight.detach(), bits, 16)
    layer = GroupedLinear.from_levels(linear, rounded.levels, rounded.zero_point, rounded.scale, bits)
    torch.testing.assert_close(layer(inputs), inputs @ rounded.dequantize() + linear.bias)

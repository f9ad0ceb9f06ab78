from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.core.checkpoints import load_model
from stages.core.examples import load_examples
from stages.core.judging import predict_logits
from stages.core.params import ActivationParams, SmoothingParams
from stages.core.quantized import QuantizedLinear
from stages.core.structure import encoder_layers, keep_parts
from stages.quantize.observe import collect_inputs
from stages.quantize.recipes import quantizable_layers
from stages.quantize.smooth import find_sites, fold, smooth, smoothing_divisor

MINMAX = ActivationParams(observer="minmax", percentile=100.0)
OUTPUT = "bert.encoder.layer.0.attention.output.dense"
VALUE = "bert.encoder.layer.0.attention.self.value"


@pytest.fixture
def model(tiny_checkpoint: Path) -> nn.Module:
    """A model of irregular widths."""
    model = load_model(tiny_checkpoint)
    keep_parts(encoder_layers(model)[0], torch.tensor([0, 2, 3]), torch.arange(40))
    return model


@pytest.fixture
def rows(tiny_data: Path) -> list[list[int]]:
    return load_examples(tiny_data, "validation").input_ids


def test_the_divisor_by_hand() -> None:
    inputs = torch.tensor([[4.0, -1.0, 0.0, 3.0], [-2.0, 1.0, 0.0, 9.0]])
    weights = [torch.tensor([[1.0, 0.5, 1.0, 0.0]]), torch.tensor([[-4.0, 0.25, 1.0, 0.0]])]
    assert smoothing_divisor(inputs, weights, 0.5).tolist() == pytest.approx([1.0, 2**0.5, 1.0, 1.0])
    assert smoothing_divisor(inputs, weights, 1.0).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert smoothing_divisor(inputs, weights, 0.0).tolist() == [1.0] * 4


def test_folding_into_the_value_projection_is_exact(model: nn.Module, rows: list[list[int]]) -> None:
    before = predict_logits(model, rows, 0)
    features = model.get_submodule(OUTPUT).in_features
    torch.manual_seed(0)
    fold(model, VALUE, [OUTPUT], torch.rand(features) * 10 + 0.1)  # type: ignore[arg-type, operator]
    torch.testing.assert_close(predict_logits(model, rows, 0), before, atol=2e-5, rtol=0)


def test_factors_change_nothing_before_rounding() -> None:
    torch.manual_seed(0)
    linear, inputs, factor = nn.Linear(16, 8), torch.randn(30, 16), torch.rand(16) + 0.5
    layer = QuantizedLinear.from_linear(linear, None, factor)
    weight = layer.weight.float() * layer.weight_scale[:, None]
    step = layer.weight_scale[:, None].expand_as(weight) / 2
    exact = (inputs * factor) @ (linear.weight / factor).t() + linear.bias
    torch.testing.assert_close(exact, linear(inputs))
    assert ((weight - linear.weight / factor).abs() <= step * 1.001).all()


def test_layers_that_read_the_same_input_are_smoothed_alike(model: nn.Module) -> None:
    sites = find_sites(model, quantizable_layers(model))
    assert [len(site.readers) for site in sites if len(site.readers) > 1] == [3, 3]
    assert sorted(name for site in sites for name in site.readers) == sorted(quantizable_layers(model))
    assert {site.readers[0]: site.writer for site in sites if site.writer}[OUTPUT] == VALUE


def test_an_outlying_channel_is_smoothed_and_the_model_stays_the_same(model: nn.Module, rows: list[list[int]]) -> None:
    value: Any = model.get_submodule(VALUE)
    output: Any = model.get_submodule(OUTPUT)
    value.weight.data[3] *= 300.0
    value.bias.data[3] *= 300.0
    output.weight.data[:, 3] /= 300.0
    inputs = collect_inputs(model, quantizable_layers(model), rows, 0)
    smoothed = smooth(model, inputs, SmoothingParams(strengths=[0.0, 0.5], least_gain=0.999), MINMAX, 127)
    assert smoothed.strengths[OUTPUT] == 0.5
    assert smoothed.factors == {}
    changed: Any = smoothed.model.get_submodule(VALUE)
    assert changed.weight.abs().max() < value.weight.abs().max() / 10
    torch.testing.assert_close(
        predict_logits(smoothed.model, rows, 0), predict_logits(model, rows, 0), atol=1e-4, rtol=0
    )


def test_a_factor_of_its_own_must_pay(model: nn.Module, rows: list[list[int]]) -> None:
    inputs = collect_inputs(model, quantizable_layers(model), rows, 0)
    free, never = (
        smooth(model, inputs, SmoothingParams(strengths=[0.0, 0.25, 0.5], least_gain=gain), MINMAX, 127)
        for gain in (0.0, 0.999)
    )
    assert free.factors
    assert not never.factors
    for reader in ("query", "key", "value"):
        names = [name for name in free.factors if name.endswith(reader)]
        assert all(torch.equal(free.factors[name], free.factors[name.replace(reader, "query")]) for name in names)


def test_strength_zero_alone_leaves_everything_as_it_is(model: nn.Module, rows: list[list[int]]) -> None:
    inputs = collect_inputs(model, quantizable_layers(model), rows, 0)
    smoothed = smooth(model, inputs, SmoothingParams(strengths=[0.0], least_gain=0.0), MINMAX, 127)
    assert (set(smoothed.strengths.values()), smoothed.factors) == ({0.0}, {})
    assert torch.equal(predict_logits(smoothed.model, rows, 0), predict_logits(model, rows, 0))

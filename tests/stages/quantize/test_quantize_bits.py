"""What 7-bit weights are for: x86 CPUs without VNNI add two products in 16 bits (`vpmaddubsw`)."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stages.core.checkpoints import load_model
from stages.core.onnx_graph import WEIGHT_BITS_PROPERTY, export_onnx
from stages.core.quantized import SEVEN_BIT_LIMIT, WEIGHT_LIMIT, QuantizedLinear, weight_bits
from stages.quantize.bits import needed_bits
from stages.quantize.recipes import quantizable_layers, quantize_model, with_parts

Array = numpy.ndarray
FIRST, LAST = -(2**15), 2**15 - 1


def product(activations: Array, weights: Array, saturate: bool) -> Array:
    """Sums of products of uint8 [inputs] with int8 [outputs, inputs]: pairs in 16 bits, then pairs in 32."""
    pairs = (weights.astype(numpy.int64) * activations.astype(numpy.int64)).reshape(len(weights), -1, 2).sum(axis=2)
    return (pairs.clip(FIRST, LAST) if saturate else pairs).sum(axis=1)


def test_by_hand_the_largest_pair_of_seven_bits_fits_and_that_of_eight_does_not() -> None:
    most = numpy.array([255, 255])
    assert product(most, numpy.array([[63, 63], [-63, -63]]), saturate=True).tolist() == [32_130, -32_130]
    assert product(most, numpy.array([[64, 64]]), saturate=True).tolist() == [32_640]  # one more level would fit, too
    assert product(most, numpy.array([[127, 127]]), saturate=False).tolist() == [64_770]
    assert product(most, numpy.array([[127, 127]]), saturate=True).tolist() == [32_767]
    assert (SEVEN_BIT_LIMIT, WEIGHT_LIMIT) == (63, 127)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_seven_bit_weights_never_saturate_and_eight_bit_ones_do(seed: int, half: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(2 * half, 3)
    linear.weight.data = torch.randn(3, 2 * half, generator=generator)
    linear.weight.data[0] = 1.0  # a row of largest weights, which meets the largest inputs below
    activations = torch.randint(0, 256, (2 * half,), generator=generator).numpy()
    activations[:2] = 255
    seven = QuantizedLinear.from_linear(linear, None, limit=SEVEN_BIT_LIMIT)
    eight = QuantizedLinear.from_linear(linear, None)
    assert (weight_bits(seven), weight_bits(eight)) == (7, 8)
    levels = seven.weight.numpy()
    assert (product(activations, levels, saturate=True) == product(activations, levels, saturate=False)).all()
    levels = eight.weight.numpy()
    assert (product(activations, levels, saturate=True) != product(activations, levels, saturate=False)).any()


@pytest.mark.parametrize(
    ("features", "wanted", "expected"),
    [
        (["avx2"], "auto", 7),
        (["avx2", "avx512f"], "auto", 7),
        (["avx2", "avx_vnni"], "auto", 8),
        (["avx2", "avx512f", "avx512_vnni"], "auto", 8),
        (["avx2"], 8, 8),
        (["amx_int8"], 7, 7),
    ],
)
def test_the_cpu_chooses_the_bits_where_params_leave_it_to_it(
    monkeypatch: pytest.MonkeyPatch, features: list[str], wanted: object, expected: int
) -> None:
    monkeypatch.setattr("stages.core.hardware.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("stages.core.hardware.describe_cpu", lambda: {"features": features})
    assert needed_bits(wanted) == expected  # type: ignore[arg-type]


def test_an_arm_cpu_needs_no_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.core.hardware.platform.machine", lambda: "aarch64")
    monkeypatch.setattr("stages.core.hardware.describe_cpu", lambda: {"features": ["neon"]})
    assert needed_bits("auto") == 8


def test_the_onnx_file_tells_the_bits_of_its_products(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    layers = quantizable_layers(model)
    seven = {
        name: QuantizedLinear.from_linear(part, None, limit=SEVEN_BIT_LIMIT)
        for name, part in model.named_modules()
        if name in layers and isinstance(part, nn.Linear)
    }
    eight = quantize_model(model, dict.fromkeys(layers))
    told = {}
    for name, each in {"float": model, "seven": with_parts(model, seven), "eight": eight}.items():
        path = tmp_path / f"{name}.onnx"
        export_onnx(each, path, ["input_ids", "attention_mask"], "logits", 20)
        told[name] = {entry.key: entry.value for entry in onnx.load(path).metadata_props}.get(WEIGHT_BITS_PROPERTY)
    assert told == {"float": None, "seven": "7", "eight": "8"}

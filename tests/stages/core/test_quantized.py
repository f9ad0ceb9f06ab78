import json

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stages.core.errors import UserError
from stages.core.quantized import (
    ActivationRange,
    GroupedLinear,
    HalfEmbedding,
    HalfLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    describe_quantized,
    is_quantized,
    pack,
    quantize,
    quantize_by_own_range,
    rebuild_quantized,
    round_in_steps,
    unpack,
)

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


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 1000))
def test_packing_loses_nothing(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(levels, bits)
    assert len(packed) == (rows * columns * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, rows, columns), levels)


def test_four_bits_are_packed_as_onnx_packs_them() -> None:
    levels = torch.tensor([[1, 2, 3], [4, 15, 6]], dtype=torch.uint8)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.UINT4, dims=[2, 3], raw_data=pack(levels, 4).numpy().tobytes())
    assert onnx.numpy_helper.to_array(tensor).astype(int).tolist() == levels.tolist()


def test_steps_of_weights_on_their_grid_are_found_exactly() -> None:
    # Multiples of 18 and of 3, whose largest fill the range of 4 bits.
    multiples = torch.tensor([[7, -7, 1, 0, 7, 2, -1, -7]])
    weight = multiples * torch.tensor([[18.0] * 4 + [3.0] * 4])
    found, steps = round_in_steps(weight, 4)
    assert steps.tolist() == [[18, 3]]
    assert torch.equal(found, multiples.to(torch.int8))


@given(st.integers(0, 1000), st.sampled_from([63, 127]), st.sampled_from([4, 16]))
def test_no_other_step_errs_less_and_none_leaves_the_range(seed: int, limit: int, group: int) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) ** 3
    weight = weight / weight.abs().amax(dim=1, keepdim=True) * limit
    multiples, steps = round_in_steps(weight, group, limit)
    rounded = multiples * steps.to(torch.int8).repeat_interleave(group, dim=1)
    assert rounded.abs().max() <= limit
    errors = (rounded - weight).square().unflatten(1, (-1, group)).sum(dim=2)
    for step in range(1, limit // 7 + 1):
        other = (weight / step).round().clamp(-7, 7) * step
        assert (errors <= (other - weight).square().unflatten(1, (-1, group)).sum(dim=2) + 1e-3).all()


def test_what_is_stored_in_steps_takes_half_the_bytes_and_loads_to_the_same_weights() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(64, 32)
    whole, halved = (QuantizedEmbedding.from_embedding(table, group) for group in (None, 16))
    bytes_of = {name: sum(part.nbytes for part in table.state_dict().values()) for name, table in
                (("whole", whole), ("halved", halved))}  # fmt: skip
    assert bytes_of == {"whole": 64 * 32 + 64 * 4, "halved": 64 * 32 // 2 + 64 * 2 + 64 * 4}
    loaded = QuantizedEmbedding(64, 32, 16)
    loaded.load_state_dict(halved.state_dict())
    assert torch.equal(loaded.weight, halved.weight)
    ids = torch.arange(64)
    assert (halved(ids) - table(ids)).norm() < 0.12 * table.weight.norm()


def test_an_embedding_is_within_half_a_step_of_each_row() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 12, padding_idx=0)
    embedding.weight.data *= torch.arange(50)[:, None]
    quantized = QuantizedEmbedding.from_embedding(embedding)
    ids = torch.arange(50).reshape(5, 10)
    steps = embedding.weight.abs().amax(dim=1)[ids][..., None] / 127
    assert ((quantized(ids) - embedding(ids)).abs() <= steps / 2 + 1e-6).all()


@pytest.mark.parametrize(("half", "relative"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_halves_round_to_their_own_precision(half: str, relative: float) -> None:
    torch.manual_seed(0)
    linear, embedding = nn.Linear(16, 8), nn.Embedding(9, 4)
    layer, table = HalfLinear.from_linear(linear, half), HalfEmbedding.from_embedding(embedding, half)
    assert layer.weight.element_size() == table.weight.element_size() == 2
    torch.testing.assert_close(layer.weight.float(), linear.weight, rtol=relative, atol=1e-6)
    torch.testing.assert_close(table(torch.arange(9)), embedding.weight, rtol=relative, atol=1e-6)
    assert layer(torch.randn(3, 16)).dtype == table(torch.arange(2)).dtype == torch.float32


def test_every_kind_is_rebuilt_from_its_description() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(32, 5) for _ in range(4)]
    levels, zeros = torch.randint(0, 16, (32, 5)).to(torch.uint8), torch.randint(0, 16, (2, 5)).to(torch.uint8)
    parts = [
        QuantizedLinear.from_linear(linears[0], ActivationRange.covering(-2.0, 1.0), torch.rand(32) + 0.5, 63),
        QuantizedLinear.from_linear(linears[1], None, group=16),
        GroupedLinear.from_levels(linears[2], levels, zeros, torch.rand(2, 5), 4),
        HalfLinear.from_linear(linears[3], "bf16"),
    ]
    tables = [
        QuantizedEmbedding.from_embedding(nn.Embedding(7, 16), 16),
        HalfEmbedding.from_embedding(nn.Embedding(7, 3), "fp16"),
    ]
    model = nn.Sequential(*parts, *tables)
    empty = nn.Sequential(*linears, nn.Embedding(7, 16), nn.Embedding(7, 3))
    rebuild_quantized(empty, json.loads(json.dumps(describe_quantized(model))))
    empty.load_state_dict(model.state_dict())
    inputs, ids = torch.randn(4, 32), torch.arange(7)
    for one, other in zip(model, empty, strict=True):
        given_inputs = ids if "Embedding" in type(one).__name__ else inputs
        assert torch.equal(one(given_inputs), other(given_inputs))
    assert is_quantized(model)
    assert not is_quantized(nn.Sequential(HalfLinear.from_linear(linears[3], "bf16")))


def test_an_unknown_kind_is_a_users_error() -> None:
    with pytest.raises(UserError, match="0 is quantized as ternary, this version reads linear_int8"):
        rebuild_quantized(nn.Sequential(nn.Linear(2, 2)), {"0": {"kind": "ternary"}})

"""Linear layers and embeddings in few bits, simulated exactly as the ONNX file computes them.

- `QuantizedLinear`: symmetric int8 weights with one scale an output channel; unsigned 8-bit activations with one scale
  and zero point a tensor (Jacob et al., 1712.05877), and where it pays a factor an input channel (SmoothQuant,
  2211.10438). `torch.ops.quantized_decomposed` pairs become QuantizeLinear and DequantizeLinear in ONNX, which the
  runtimes fuse into integer matrix products.
- `QuantizedEmbedding`: int8 rows with one scale a row; only the rows looked up ever become float.
- Either may be stored in half the bytes: the int8 values of each few neighbours are then fifteen multiples of one
  whole step, and the file holds the multiples in 4 bits. They become int8 once, when a runtime loads them, so that
  products stay those of int8: few bits on disk, integers in the processor (compare the double quantization of QLoRA,
  2305.14314, whose second scales are floats).
- `GroupedLinear`: 4 or 8 bit weights with one scale and zero point for each few inputs of a channel; activations stay
  float. It becomes a blockwise DequantizeLinear, which ONNX Runtime fuses into MatMulNBits.
- `HalfLinear`, `HalfEmbedding`: weights in bfloat16 or float16. Which precision multiplies is the runtime's choice:
  OpenVINO takes bfloat16 and TensorRT float16 where the device has them; ONNX Runtime on a CPU has neither and
  computes in float32, so the file is half as large there and no faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError

WEIGHT_LIMIT = 127
SEVEN_BIT_LIMIT = 63
"""Two products of such weights with 8-bit activations, 2 * 255 * 63 = 32,130, fit into 16 bits; of 127 they do not."""
ACTIVATION_LEVELS = 255
LARGEST_MULTIPLE = 7
_NIBBLE = 15
_SMALLEST_SCALE = 1e-8
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


class Int8Weights(nn.Module):
    """int8 weights [rows, columns] that a checkpoint holds as they are, or in 4 bits.

    Args:
        rows: each has a scale of its own.
        columns: of a row.
        group: neighbours in a row whose values are multiples of one step, which divides `columns`; None for any values.
    """

    weight: Tensor
    """int8 [rows, columns]; what computes."""
    packed: Tensor | None
    """uint8 [rows * columns / 2]; what is stored of grouped weights: multiples from -7 to 7, two a byte."""
    step: Tensor | None
    """uint8 [rows, columns / group]; int8 weight = multiple * step."""

    def __init__(self, rows: int, columns: int, group: int | None):
        super().__init__()
        self.group = group
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.int8), persistent=group is None)
        self.register_buffer("packed", None if group is None else torch.zeros(rows * columns // 2, dtype=torch.uint8))
        self.register_buffer("step", None if group is None else torch.ones(rows, columns // group, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_expand)  # type: ignore[no-untyped-call]

    def hold(self, weight: Tensor, scales: Tensor, limit: int) -> None:
        """Round float weights [rows, columns] by row, and by group where there are groups."""
        if self.group is None:
            self.weight = quantize_weight(weight, scales, limit)
            return
        self.hold_steps(*round_in_steps(weight / scales[:, None], self.group, limit))

    def hold_steps(self, multiples: Tensor, step: Tensor) -> None:
        """Take over multiples int8 [rows, columns] and steps uint8 [rows, groups]."""
        self.packed, self.step = pack(multiples.to(torch.uint8) & _NIBBLE, 4), step
        _expand(self)


class QuantizedLinear(Int8Weights):
    """A linear layer with int8 weights and 8-bit activations."""

    kind = "linear_int8"
    weight_scale: Tensor
    bias: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activations: ActivationRange | None,
        smoothed: bool = False,
        group: int | None = None,
    ):
        super().__init__(out_features, in_features, group)
        self.in_features, self.out_features = in_features, out_features
        self.activations = activations
        """Range fixed by calibration; None takes the range of each input as it comes."""
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("input_scale", torch.ones(in_features) if smoothed else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activations: ActivationRange | None,
        input_scale: Tensor | None = None,
        limit: int = WEIGHT_LIMIT,
        group: int | None = None,
    ) -> QuantizedLinear:
        """Quantize a float layer.

        Args:
            linear: with weights [out, in].
            activations: range of its inputs after `input_scale`; None takes that of each input as it comes.
            input_scale: factor of each input, [in], that the weights divide away again; None for none.
            limit: the largest weight becomes this level.
            group: inputs whose weights are multiples of one step; None for weights of 8 bits each.
        """
        quantized = cls(linear.in_features, linear.out_features, activations, input_scale is not None, group)
        weight = linear.weight.detach()
        if input_scale is not None:
            weight, quantized.input_scale = weight / input_scale, input_scale.clone()
        quantized.weight_scale = weight_scales(weight, limit)
        quantized.hold(weight, quantized.weight_scale, limit)
        if linear.bias is not None:
            quantized.bias = linear.bias.detach().clone()
        return quantized

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], replaced: Any) -> QuantizedLinear:
        """Make the empty layer that `describe` told of, in the place of a float one."""
        activations = None if entry["activations"] is None else ActivationRange(**entry["activations"])
        return cls(replaced.in_features, replaced.out_features, activations, entry["smoothed"], entry.get("group"))

    def describe(self) -> dict[str, Any]:
        """Say in JSON what the tensors cannot."""
        activations = None if self.activations is None else asdict(self.activations)
        smoothed = self.input_scale is not None
        return {"kind": self.kind, "activations": activations, "smoothed": smoothed, "group": self.group}

    def count_parameters(self) -> int:
        """Count weights and biases."""
        return self.weight.numel() + self.bias.numel()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        if self.input_scale is not None:
            inputs = inputs * self.input_scale
        seen = quantize_by_own_range(inputs) if self.activations is None else quantize(inputs, self.activations)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.weight_scale, zeros, 0, -WEIGHT_LIMIT, WEIGHT_LIMIT, torch.int8
        )
        return functional.linear(seen, weight, self.bias)


class QuantizedEmbedding(Int8Weights):
    """An embedding with int8 rows."""

    kind = "embedding_int8"
    row_scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, group: int | None = None):
        super().__init__(num_embeddings, embedding_dim, group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("row_scale", torch.ones(num_embeddings, 1))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, group: int | None = None) -> QuantizedEmbedding:
        """Quantize the rows of a float embedding; `group` features share a step, None for 8 bits each."""
        quantized = cls(embedding.num_embeddings, embedding.embedding_dim, group)
        weight = embedding.weight.detach()
        scales = weight_scales(weight)
        quantized.row_scale = scales[:, None]
        quantized.hold(weight, scales, WEIGHT_LIMIT)
        return quantized

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], replaced: Any) -> QuantizedEmbedding:
        """Make the empty embedding that `describe` told of, in the place of a float one."""
        return cls(replaced.num_embeddings, replaced.embedding_dim, entry.get("group"))

    def describe(self) -> dict[str, Any]:
        """Say in JSON what the tensors cannot."""
        return {"kind": self.kind, "group": self.group}

    def count_parameters(self) -> int:
        """Count weights."""
        return self.weight.numel()

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up, [...] -> [..., features]; int8 rows are gathered first, so the table never becomes float."""
        rows = functional.embedding(ids, self.weight)
        return rows.float() * functional.embedding(ids, self.row_scale)


class GroupedLinear(nn.Module):
    """A linear layer with 4 or 8 bit weights in groups of inputs; activations stay float."""

    kind = "linear_groups"
    weight: Tensor
    zero_point: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, group: int):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        groups = in_features // group
        self.register_buffer("weight", pack(torch.zeros(in_features, out_features, dtype=torch.uint8), bits))
        self.register_buffer("zero_point", pack(torch.zeros(groups, out_features, dtype=torch.uint8), bits))
        self.register_buffer("scale", torch.ones(groups, out_features))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def from_levels(
        cls, linear: nn.Linear, levels: Tensor, zero_point: Tensor, scale: Tensor, bits: int
    ) -> GroupedLinear:
        """Take over rounded weights.

        Args:
            linear: the float layer, for shape and bias.
            levels: uint8 [in, out], each below 2 ** bits.
            zero_point: uint8 [groups, out].
            scale: float [groups, out].
            bits: 4 or 8.
        """
        quantized = cls(linear.in_features, linear.out_features, bits, len(levels) // len(scale))
        quantized.weight, quantized.zero_point, quantized.scale = pack(levels, bits), pack(zero_point, bits), scale
        if linear.bias is not None:
            quantized.bias = linear.bias.detach().clone()
        return quantized

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], replaced: Any) -> GroupedLinear:
        """Make the empty layer that `describe` told of, in the place of a float one."""
        return cls(replaced.in_features, replaced.out_features, entry["bits"], entry["group"])

    def describe(self) -> dict[str, Any]:
        """Say in JSON what the tensors cannot."""
        return {"kind": self.kind, "bits": self.bits, "group": self.group}

    def count_parameters(self) -> int:
        """Count weights and biases."""
        return self.in_features * self.out_features + self.bias.numel()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        weight = dequantize_groups(
            self.weight, self.scale, self.zero_point, self.in_features, self.out_features, self.group, self.bits
        )
        outputs: Tensor = inputs @ weight + self.bias
        return outputs


class HalfLinear(nn.Module):
    """A linear layer whose weights are stored in 16 bits."""

    kind = "linear_half"
    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, half: str):
        super().__init__()
        self.in_features, self.out_features, self.half_name = in_features, out_features, half
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=_HALVES[half]))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def from_linear(cls, linear: nn.Linear, half: str) -> HalfLinear:
        """Round the weights of a float layer to `bf16` or `fp16`."""
        rounded = cls(linear.in_features, linear.out_features, half)
        rounded.weight = linear.weight.detach().to(_HALVES[half])
        if linear.bias is not None:
            rounded.bias = linear.bias.detach().clone()
        return rounded

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], replaced: Any) -> HalfLinear:
        """Make the empty layer that `describe` told of, in the place of a float one."""
        return cls(replaced.in_features, replaced.out_features, entry["half"])

    def describe(self) -> dict[str, Any]:
        """Say in JSON what the tensors cannot."""
        return {"kind": self.kind, "half": self.half_name}

    def count_parameters(self) -> int:
        """Count weights and biases."""
        return self.weight.numel() + self.bias.numel()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        return functional.linear(inputs, self.weight.float(), self.bias)


class HalfEmbedding(nn.Module):
    """An embedding stored in 16 bits."""

    kind = "embedding_half"
    weight: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, half: str):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.half_name = num_embeddings, embedding_dim, half
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=_HALVES[half]))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, half: str) -> HalfEmbedding:
        """Round a float embedding to `bf16` or `fp16`."""
        rounded = cls(embedding.num_embeddings, embedding.embedding_dim, half)
        rounded.weight = embedding.weight.detach().to(_HALVES[half])
        return rounded

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], replaced: Any) -> HalfEmbedding:
        """Make the empty embedding that `describe` told of, in the place of a float one."""
        return cls(replaced.num_embeddings, replaced.embedding_dim, entry["half"])

    def describe(self) -> dict[str, Any]:
        """Say in JSON what the tensors cannot."""
        return {"kind": self.kind, "half": self.half_name}

    def count_parameters(self) -> int:
        """Count weights."""
        return self.weight.numel()

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up, [...] -> [..., features]."""
        return functional.embedding(ids, self.weight).float()


class _Part(Protocol):
    kind: str

    def describe(self) -> dict[str, Any]: ...

    def count_parameters(self) -> int: ...


_PARTS = (QuantizedLinear, QuantizedEmbedding, GroupedLinear, HalfLinear, HalfEmbedding)
_HALF_PARTS = (HalfLinear, HalfEmbedding)


def quantized_parts(model: nn.Module) -> dict[str, _Part]:
    """Find the modules of this file in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _PARTS)}


def is_quantized(model: nn.Module) -> bool:
    """Tell whether integers take part, so that runtimes may differ by a rounding step; 16-bit floats do not count."""
    return any(not isinstance(part, _HALF_PARTS) for part in quantized_parts(model).values())


def weight_bits(model: nn.Module) -> int | None:
    """Bits that the weights of the int8 products need, 7 or 8, told by the weights themselves; None without products.

    7 are right on every CPU; with 8, x86 CPUs without VNNI saturate.
    """
    largest = [int(part.weight.abs().amax()) for part in model.modules() if isinstance(part, QuantizedLinear)]
    if not largest:
        return None
    return 7 if max(largest) <= SEVEN_BIT_LIMIT else 8


def describe_quantized(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the quantized parts of a model in JSON, by name."""
    return {name: part.describe() for name, part in quantized_parts(model).items()}


def rebuild_quantized(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty quantized parts where `describe_quantized` found them, in place; weights are to be loaded over.

    Raises:
        UserError: if a part is of a kind that this version does not know.
    """
    kinds: dict[str, Any] = {part.kind: part for part in _PARTS}
    for name, entry in entries.items():
        kind = (entry or {}).get("kind")
        if kind not in kinds:
            raise UserError(f"headroom.json: {name} is quantized as {kind}, this version reads {', '.join(kinds)}")
        replace_module(model, name, kinds[kind].from_entry(entry, model.get_submodule(name)))


def weight_scales(weight: Tensor, limit: int = WEIGHT_LIMIT) -> Tensor:
    """Scale of each output channel, [out]: the largest weight becomes `limit`."""
    return (weight.abs().amax(dim=1) / limit).clamp(min=_SMALLEST_SCALE)


def quantize_weight(weight: Tensor, scales: Tensor, limit: int = WEIGHT_LIMIT) -> Tensor:
    """Round float weights [out, in] to int8 by channel."""
    return (weight / scales[:, None]).round().clamp(-limit, limit).to(torch.int8)


def round_in_steps(weight: Tensor, group: int, limit: int = WEIGHT_LIMIT) -> tuple[Tensor, Tensor]:
    """Round weights to whole multiples, -7 to 7, of a whole step for each group: of all steps the one that errs least.

    Args:
        weight: in units of the row's scale, [rows, columns], so that int8 would round them to whole numbers.
        group: neighbours in a row that share a step; divides `columns`.
        limit: no multiple times its step is larger.

    Returns:
        multiples int8 [rows, columns], steps uint8 [rows, columns / group].
    """
    groups = weight.reshape(len(weight), -1, group)
    best, best_steps = torch.zeros_like(groups), torch.ones_like(groups[..., :1])
    least = torch.full_like(best_steps, float("inf"))
    for step in range(1, limit // LARGEST_MULTIPLE + 1):
        multiples = (groups / step).round().clamp(-LARGEST_MULTIPLE, LARGEST_MULTIPLE)
        error = (multiples * step - groups).square().sum(dim=2, keepdim=True)
        better = error < least
        best, best_steps = torch.where(better, multiples, best), best_steps.masked_fill(better, float(step))
        least = torch.minimum(error, least)
    return best.flatten(1).to(torch.int8), best_steps.squeeze(2).to(torch.uint8)


def _expand(module: Any, _: object = None) -> None:
    """Make int8 weights of stored multiples; the hook that loading a state calls."""
    if module.group is None:
        return
    rows, columns = module.weight.shape
    multiples = unpack(module.packed, 4, rows, columns).to(torch.int8)
    multiples = torch.where(multiples > LARGEST_MULTIPLE, multiples - _NIBBLE - 1, multiples)
    steps = module.step.to(torch.int8).repeat_interleave(module.group, dim=1)
    module.weight = multiples * steps


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack uint8 levels into bytes, flat and in row-major order, the earlier of two 4-bit levels in the low half.

    This is the layout of ONNX's 4-bit tensors.
    """
    flat = levels.flatten()
    if bits == 8:
        return flat.clone()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Undo `pack`: uint8 levels [rows, columns]."""
    flat = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return flat[: rows * columns].view(rows, columns)


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


# Operators of their own, so that export finds them and writes DynamicQuantizeLinear and a blockwise DequantizeLinear.
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


@torch.library.custom_op("headroom::dequantize_groups", mutates_args=())
def dequantize_groups(
    packed: Tensor, scale: Tensor, zero_point: Tensor, rows: int, columns: int, group: int, bits: int
) -> Tensor:
    """Float weights [rows, columns] of packed levels; `group` rows after each other share scale and zero point."""
    levels = unpack(packed, bits, rows, columns).float().view(rows // group, group, columns)
    zeros = unpack(zero_point, bits, rows // group, columns).float()
    return ((levels - zeros[:, None]) * scale[:, None]).view(rows, columns)


@dequantize_groups.register_fake
def _(packed: Tensor, scale: Tensor, zero_point: Tensor, rows: int, columns: int, group: int, bits: int) -> Tensor:
    return scale.new_empty(rows, columns)

"""An exported ONNX graph as a PyTorch module, so that PyTorch can be one of the runtimes of the same file.

Knows the operators that `stages.core.lean` and `stages.core.quantized` become; a graph with others is refused. What
does not depend on the inputs is computed once: int8 weights become float ones, and integer products are simulated in
float, right and slow, as when the model was quantized.

Shapes are Python integers here, not tensors, so that `torch.compile` can follow them without leaving the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from stages.core.errors import UserError

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_INTEGERS: Mapping[int, torch.dtype] = {
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.BOOL: torch.bool,
}
_LEVELS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def torch_module(model: onnx.ModelProto, inputs: Sequence[str], precision: torch.dtype) -> fx.GraphModule:
    """Translate a graph.

    Args:
        model: with one output.
        inputs: names of its inputs, in the order of the module's arguments.
        precision: of the float arithmetic.

    Raises:
        UserError: if the graph has an operator that is not known here.
    """
    unknown = sorted({node.op_type for node in model.graph.node} - set(_OPERATORS))
    if unknown:
        raise UserError(f"PyTorch has no counterpart here for {', '.join(unknown)}")
    translation = _Translation(precision)
    for name in inputs:
        translation.values[name] = translation.graph.placeholder(name)
    for tensor in model.graph.initializer:
        translation.values[tensor.name] = _to_tensor(tensor, precision)
    for node in model.graph.node:
        translation.add(node)
    translation.graph.output(translation.argument(model.graph.output[0].name))
    return fx.GraphModule(translation.module, translation.graph).eval()


class _Translation:
    """Values by their ONNX name: nodes of the new graph, or constants."""

    def __init__(self, precision: torch.dtype):
        self.precision = precision
        self.module, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, Any] = {"": None}
        self._stored: dict[str, fx.Node] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Translate a node, or compute it where all its inputs are constants."""
        function = _OPERATORS[node.op_type]
        attributes = {entry.name: _plain(onnx.helper.get_attribute_value(entry)) for entry in node.attribute}
        if node.op_type in _NEED_PRECISION:
            attributes["precision"] = self.precision
        values = [self.values[name] for name in node.input]
        if any(isinstance(value, fx.Node) for value in values):
            result: Any = self.graph.call_function(
                function, tuple(self.argument(name) for name in node.input), attributes
            )
        else:
            result = function(*values, **attributes)
        if len(node.output) == 1:
            self.values[node.output[0]] = result
            return
        for index, name in enumerate(node.output):
            constant = not isinstance(result, fx.Node)
            self.values[name] = (
                result[index] if constant else self.graph.call_function(operator.getitem, (result, index))
            )

    def argument(self, name: str) -> Any:
        """A value as an argument of a node: a constant becomes a buffer of the module, or a list where it is small."""
        value = self.values[name]
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.int64 and value.dim() <= 1:
            return value.tolist()  # axes, bounds, parts of a shape
        if name not in self._stored:
            buffer = f"constant_{len(self._stored)}"
            self.module.register_buffer(buffer, value.contiguous())
            self._stored[name] = self.graph.get_attr(buffer)
        return self._stored[name]


def _to_tensor(tensor: onnx.TensorProto, precision: torch.dtype) -> Tensor:
    """A constant; floats in the precision wanted, 4-bit levels in bytes, which PyTorch has."""
    if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        kind = numpy.uint8 if tensor.data_type == onnx.TensorProto.UINT4 else numpy.int8
        return torch.from_numpy(numpy_helper.to_array(tensor).astype(kind))
    if tensor.data_type in _FLOATS:
        return torch.from_numpy(numpy_helper.to_array(tensor).astype(numpy.float32)).to(precision)
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _cast(value: Any, to: int, precision: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Any:
    if not isinstance(value, Tensor):
        return value  # a shape
    return value.to(precision if to in _FLOATS else _INTEGERS[to])


def _shape(data: Tensor, start: int = 0, end: int | None = None) -> list[int]:
    return list(data.shape[start:end])


def _concat(*parts: Any, axis: int) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=axis)
    return [size for part in parts for size in part]


def _squeeze(data: Any, axes: Sequence[int] | None = None) -> Any:
    if isinstance(data, Tensor):
        return data.squeeze(tuple(axes)) if axes else data.squeeze()
    (only,) = data
    return only


def _unsqueeze(data: Any, axes: Any) -> Any:
    if not isinstance(data, Tensor):
        return [data]
    for axis in sorted(_list(axes)):
        data = data.unsqueeze(axis)
    return data


def _reshape(data: Tensor, shape: Any, allowzero: int = 0) -> Tensor:
    sizes = [data.shape[place] if size == 0 and not allowzero else size for place, size in enumerate(_list(shape))]
    return data.reshape(sizes)


def _slice(data: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = _list(starts), _list(ends)
    axes = range(len(starts)) if axes is None else _list(axes)
    steps = [1] * len(starts) if steps is None else _list(steps)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        data = (
            data[(slice(None),) * axis + (slice(start, end, step),)]
            if isinstance(data, Tensor)
            else data[start:end:step]
        )
    return data


def _gather(data: Any, indices: Any, axis: int = 0) -> Any:
    if not isinstance(data, Tensor):
        return data[indices] if isinstance(indices, int) else [data[index] for index in _list(indices)]
    if isinstance(indices, int):
        return data.select(axis, indices)
    places = indices if isinstance(indices, Tensor) else torch.tensor(indices)
    if axis == 0 and data.dim() == 2:
        return functional.embedding(places, data)
    picked = data.index_select(axis, places.flatten())
    return picked.reshape(data.shape[:axis] + places.shape + data.shape[axis + 1 :])


def _range(start: Any, limit: Any, delta: Any) -> Tensor:
    return torch.arange(*(_number(value) for value in (start, limit, delta)))


def _layer_norm(
    data: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return functional.layer_norm(data, scale.shape, scale, bias, epsilon)


def _gemm(
    data: Tensor, weight: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, **transposed: int
) -> Tensor:
    left = data.t() if transposed.get("transA") else data
    product = alpha * (left @ (weight.t() if transposed.get("transB") else weight))
    return product if bias is None else product + beta * bias


def _cumulative_sum(data: Tensor, axis: int, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if exclusive or reverse:
        raise UserError("PyTorch has no counterpart here for a CumSum that is exclusive or runs backwards")
    return data.cumsum(axis)


def _softmax(data: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(data, dim=axis)


def _transpose(data: Tensor, perm: Sequence[int]) -> Tensor:
    return data.permute(*perm)


def _quantize(data: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 1) -> Tensor:
    """Per tensor, as activations are; rounds half to even, as ONNX does."""
    least, most = _LEVELS[zero_point.dtype]
    return ((data / scale).round() + zero_point).clamp(least, most).to(zero_point.dtype)


def _dequantize(
    levels: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 1, block_size: int = 0
) -> Tensor:
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    return (levels.to(scale.dtype) - _along(zeros, levels, axis, block_size)) * _along(scale, levels, axis, block_size)


def _along(values: Tensor, levels: Tensor, axis: int, block_size: int) -> Tensor:
    """Stretch scales or zero points, one a tensor, a channel or a block, over the levels."""
    if block_size:
        return values.repeat_interleave(block_size, dim=axis).narrow(axis, 0, levels.shape[axis])
    return values.view([-1 if place == axis else 1 for place in range(levels.dim())]) if values.dim() else values


def _dynamic_quantize(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = data.amin().clamp(max=0.0), data.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = (-low / scale).round().clamp(0, 255).to(torch.uint8)
    return _quantize(data, scale, zero_point), scale, zero_point


def _list(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Cast": _cast,
    "Concat": _concat,
    "CumSum": _cumulative_sum,
    "DequantizeLinear": _dequantize,
    "Div": operator.truediv,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Equal": operator.eq,
    "Gather": _gather,
    "Gelu": functional.gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": operator.matmul,
    "Mul": operator.mul,
    "Not": torch.logical_not,
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Relu": functional.relu,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Sub": operator.sub,
    "Tanh": torch.tanh,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_NEED_PRECISION = {"Cast"}

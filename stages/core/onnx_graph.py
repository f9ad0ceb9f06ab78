"""PyTorch to an ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnxscript import opset20 as operators
from onnxscript import opset21 as operators_with_groups
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.lean import LeanClassifier, fits
from stages.core.quantized import GroupedLinear, Int8Weights, weight_bits

WEIGHT_BITS_PROPERTY = "headroom.weight_bits"
"""In the metadata of the ONNX file, where it has int8 products: bits of their weights."""

_SAMPLE_TEXTS, _SAMPLE_LENGTH = 2, 7
_FIRST_OPSET_WITH_GROUPS = 21
_LARGEST_INLINE_BYTES = 2**31 - 2**20  # protobuf's limit


class LogitsOnly(nn.Module):
    """A model as a function of its ONNX inputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [batch, classes] of int64 ids and mask [batch, length]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def export_onnx(model: nn.Module, path: Path, inputs: Sequence[str], output: str, opset: int) -> onnx.ModelProto:
    """Write a model as ONNX with dynamic batch and length, and check it.

    A classifier of the BERT family is written in its lean form, any other model as transformers computes it.

    Args:
        model: in evaluation mode, on the CPU.
        path: of the file.
        inputs: names of the inputs, in the order of `LogitsOnly.forward`.
        output: name of the output.
        opset: ONNX operator set.

    Returns:
        the model written.

    Raises:
        UserError: if weights are in groups and the operator set has none.
    """
    if opset < _FIRST_OPSET_WITH_GROUPS and (_grouped_layers(model) or _in_steps(model)):
        raise UserError(f"export.opset: weights in groups need {_FIRST_OPSET_WITH_GROUPS} or higher, got {opset}")
    ids = torch.ones(_SAMPLE_TEXTS, _SAMPLE_LENGTH, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    form = (LeanClassifier(model) if fits(model) else LogitsOnly(model)).eval()
    with _quietly():
        program: Any = torch.onnx.export(
            form,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(axes, axes),
            opset_version=opset,
            custom_translation_table=_TRANSLATIONS,
            verbose=False,
        )
    _strip_traces(program.model)
    bits = weight_bits(form)
    if bits is not None:
        program.model.metadata_props[WEIGHT_BITS_PROPERTY] = str(bits)
    proto: onnx.ModelProto = program.model_proto
    _give_groups_their_type(proto, form)
    _store_in_steps(proto, form)
    if proto.ByteSize() > _LARGEST_INLINE_BYTES:
        program.save(path, external_data=True)
    else:
        onnx.save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)
    return proto


def _strip_traces(model: Any) -> None:
    """Drop where in the source each node and value comes from: it is large, and names folders of this machine."""
    for part in (model.graph, *model.graph.all_nodes(), *model.graph.initializers.values(), *model.graph.inputs):
        part.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()


def _dynamic_quantize(inputs: Any) -> Any:
    levels, scale, zero_point = operators.DynamicQuantizeLinear(inputs)
    return operators.DequantizeLinear(levels, scale, zero_point)


def _dequantize_groups(packed: Any, scale: Any, zero_point: Any, rows: int, columns: int, group: int, bits: int) -> Any:
    return operators_with_groups.DequantizeLinear(packed, scale, zero_point, axis=0, block_size=group)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.headroom.quantize_by_own_range.default: _dynamic_quantize,
    torch.ops.headroom.dequantize_groups.default: _dequantize_groups,
}


def _grouped_layers(model: nn.Module) -> dict[str, GroupedLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, GroupedLinear)}


def _give_groups_their_type(proto: onnx.ModelProto, form: nn.Module) -> None:
    """PyTorch has no 4-bit tensors: the packed bytes are those of ONNX's UINT4, and get its type and shape here."""
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    told = {value.name: value for value in proto.graph.value_info}
    for name, layer in _grouped_layers(form).items():
        for part, rows in (("weight", layer.in_features), ("zero_point", layer.in_features // layer.group)):
            tensor = initializers[f"{name}.{part}"]
            tensor.data_type = onnx.TensorProto.UINT4 if layer.bits == 4 else onnx.TensorProto.UINT8
            tensor.dims[:] = [rows, layer.out_features]
            if tensor.name in told:
                proto.graph.value_info.remove(told[tensor.name])


def _in_steps(model: nn.Module) -> dict[str, Int8Weights]:
    modules = model.named_modules()
    return {name: part for name, part in modules if isinstance(part, Int8Weights) and part.group is not None}


def _store_in_steps(proto: onnx.ModelProto, form: nn.Module) -> None:
    """Put 4-bit multiples and their steps in the place of int8 weights, and the nodes that make int8 of them.

    The nodes have constants for inputs, so ONNX Runtime computes them once, when it loads the file.
    """
    made: list[onnx.NodeProto] = []
    for name, part in _in_steps(form).items():
        weight = f"{name}.weight"
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == weight)
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(_stored(weight, part))
        made += _expanding(weight)
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _stored(weight: str, part: Any) -> list[onnx.TensorProto]:
    rows, columns = part.weight.shape
    shape = numpy.array([rows, columns], dtype=numpy.int64)
    packed = part.packed.numpy().tobytes()
    dimensions = [rows, columns // part.group, part.group]
    return [
        onnx.helper.make_tensor(f"{weight}.multiples", onnx.TensorProto.INT4, dimensions, packed, raw=True),
        onnx.numpy_helper.from_array(part.step.numpy()[..., None], f"{weight}.step"),
        onnx.numpy_helper.from_array(shape, f"{weight}.shape"),
    ]


def _expanding(weight: str) -> list[onnx.NodeProto]:
    """Nodes that multiply the multiples with their steps; in int32, for which every runtime has a product."""
    make, kind = onnx.helper.make_node, onnx.TensorProto
    wide = [f"{weight}.{part}.int32" for part in ("multiples", "step", "grouped", "whole")]
    return [
        make("Cast", [f"{weight}.multiples"], [wide[0]], to=kind.INT32),
        make("Cast", [f"{weight}.step"], [wide[1]], to=kind.INT32),
        make("Mul", wide[:2], [wide[2]]),
        make("Reshape", [wide[2], f"{weight}.shape"], [wide[3]]),
        make("Cast", [wide[3]], [weight], to=kind.INT8),
    ]


def weights_made_when_loaded(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Find the int8 weights that a file stores in fewer bits: their shapes by the name that products read."""
    sources = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, list[int]] = {}
    for node in graph.node:
        if node.op_type != "Cast" or _cast_to(node) != onnx.TensorProto.INT8:
            continue
        reshape = sources.get(node.input[0])
        if reshape is not None and reshape.op_type == "Reshape" and reshape.input[1] in constants:
            found[node.output[0]] = onnx.numpy_helper.to_array(constants[reshape.input[1]]).tolist()
    return found


def _cast_to(node: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")


@contextlib.contextmanager
def _quietly() -> Any:
    """Exporting prints much that tells a user nothing."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Encoders of any width as ONNX graphs, with random weights: good for timing and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper

from stages.core.latency import INPUTS, Deployment
from stages.core.structure import LayerWidth

_LONGEST = 512
_SCALE, _ZERO_POINT = numpy.float32(8.0 / 255), numpy.uint8(128)
"""Of 8-bit activations; after a norm nearly all lie within -4 and 4."""
VOCABULARY = 2048
"""Rows of the embedding: looking one up takes as long in a larger table, which would only fill the memory."""


@dataclass(frozen=True)
class EncoderShape:
    """What all the timed models have in common."""

    hidden: int
    head_size: int
    classes: int
    deployment: Deployment
    """Linear layers of encoder and pooler, and the embeddings, as the quantize stage makes them."""


@dataclass
class _Builder:
    shape: EncoderShape
    generator: numpy.random.Generator
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, values: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(numpy.asarray(values), name))
        return name

    def random(self, *shape: int) -> numpy.ndarray:
        return self.generator.standard_normal(shape, dtype=numpy.float32)

    def observed(self, inputs: str) -> str:
        """Round to 8 bits and back where the model is quantized."""
        if not self.shape.deployment.quantized:
            return inputs
        form = self.constant(_SCALE), self.constant(_ZERO_POINT)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", inputs, *form), *form)

    def linear(self, inputs: str, width: int, outputs: int, quantized: bool) -> str:
        weight, bias = self.random(outputs, width), self.constant(self.random(outputs))
        spread = numpy.float32(width**-0.5)
        if not quantized:
            return self.node("Add", self.node("MatMul", inputs, self.constant(weight.T * spread)), bias)
        levels = self.constant(numpy.clip(weight * 40, -127, 127).astype(numpy.int8))
        scales = self.constant(numpy.full(outputs, spread / 40, numpy.float32))
        zeros = self.constant(numpy.zeros(outputs, numpy.int8))
        floats = self.node("DequantizeLinear", levels, scales, zeros, axis=0)
        return self.node("Add", self.node("MatMul", inputs, self.node("Transpose", floats, perm=[1, 0])), bias)

    def norm(self, inputs: str) -> str:
        hidden = self.shape.hidden
        ones, zeros = (
            self.constant(numpy.ones(hidden, numpy.float32)),
            self.constant(numpy.zeros(hidden, numpy.float32)),
        )
        return self.node("LayerNormalization", inputs, ones, zeros, axis=-1, epsilon=1e-12)

    def embeddings(self) -> str:
        one = self.constant(numpy.array([1], numpy.int64))
        length = self.node("Shape", INPUTS[0], start=1, end=2)
        zero = self.constant(numpy.array([0], numpy.int64))
        if self.shape.deployment.int8_embeddings:
            first, step = self.constant(numpy.int64(0)), self.constant(numpy.int64(1))
            places = self.node("Range", first, self.node("Squeeze", length), step)
            words, positions = self.rows_of_int8(VOCABULARY, INPUTS[0]), self.rows_of_int8(_LONGEST, places)
        else:
            hidden = self.shape.hidden
            words = self.node("Gather", self.constant(self.random(VOCABULARY, hidden)), INPUTS[0])
            positions = self.node("Slice", self.constant(self.random(_LONGEST, hidden)), zero, length, zero, one)
        return self.norm(self.node("Add", words, positions))

    def rows_of_int8(self, rows: int, places: str) -> str:
        """Look rows up in a table of int8 with one scale a row."""
        levels = self.constant(self.generator.integers(-127, 128, (rows, self.shape.hidden), dtype=numpy.int8))
        scales = self.constant(numpy.full((rows, 1), 1 / 127, numpy.float32))
        floats = self.node("Cast", self.node("Gather", levels, places), to=TensorProto.FLOAT)
        return self.node("Mul", floats, self.node("Gather", scales, places))

    def mask_bias(self) -> str:
        """0 for a token and a large negative number for filling, [batch, 1, 1, length]."""
        seen = self.node("Cast", INPUTS[1], to=TensorProto.FLOAT)
        hidden = self.node("Sub", self.constant(numpy.float32(1)), seen)
        bias = self.node("Mul", hidden, self.constant(numpy.float32(-1e4)))
        return self.node("Unsqueeze", bias, self.constant(numpy.array([1, 2], numpy.int64)))

    def attention(self, asking: str, inputs: str, mask_bias: str, heads: int) -> str:
        shape, width = self.shape, heads * self.shape.head_size
        apart = self.constant(numpy.array([0, 0, heads, shape.head_size], numpy.int64))
        together = self.constant(numpy.array([0, 0, width], numpy.int64))
        seen = self.observed(inputs)
        asked = seen if asking == inputs else self.observed(asking)
        query, key, value = (
            self.node("Reshape", self.linear(each, shape.hidden, width, shape.deployment.quantized), apart)
            for each in (asked, seen, seen)
        )
        scaled = self.node(
            "Mul", self.node("Transpose", query, perm=[0, 2, 1, 3]), self.constant(numpy.float32(shape.head_size**-0.5))
        )
        scores = self.node("MatMul", scaled, self.node("Transpose", key, perm=[0, 2, 3, 1]))
        weights = self.node("Softmax", self.node("Add", scores, mask_bias), axis=-1)
        mixed = self.node("MatMul", weights, self.node("Transpose", value, perm=[0, 2, 1, 3]))
        flat = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), together)
        return self.linear(self.observed(flat), width, shape.hidden, shape.deployment.quantized)

    def feed_forward(self, inputs: str, neurons: int) -> str:
        shape = self.shape
        inner = self.node("Gelu", self.linear(self.observed(inputs), shape.hidden, neurons, shape.deployment.quantized))
        return self.linear(self.observed(inner), neurons, shape.hidden, shape.deployment.quantized)

    def layer(self, inputs: str, mask_bias: str, width: LayerWidth, first_only: bool) -> str:
        hidden, asking = self.shape.hidden, inputs
        if first_only:
            asking = self.node("Gather", inputs, self.constant(numpy.array([0], numpy.int64)), axis=1)
        nothing = self.constant(self.random(hidden))
        added = self.attention(asking, inputs, mask_bias, width.heads) if width.heads else nothing
        middle = self.norm(self.node("Add", added, asking))
        added = self.feed_forward(middle, width.neurons) if width.neurons else self.constant(self.random(hidden))
        return self.norm(self.node("Add", added, middle))

    def head(self, inputs: str) -> str:
        """Pooler over the first token, and classifier."""
        shape, first = self.shape, self.constant(numpy.int64(0))
        token = self.observed(self.node("Gather", inputs, first, axis=1))
        pooled = self.node("Tanh", self.linear(token, shape.hidden, shape.hidden, shape.deployment.quantized))
        return self.linear(pooled, shape.hidden, shape.classes, quantized=False)


def write_encoder(
    shape: EncoderShape, widths: Sequence[LayerWidth], path: Path, last_for_first_only: bool = False
) -> None:
    """Write a text classifier with one encoder layer per width; its weights are random.

    Args:
        shape: hidden size and the like.
        widths: of the layers; a width of 0 leaves the block out.
        path: of the ONNX file.
        last_for_first_only: let the last layer answer for the first token alone, as exported models do.
    """
    builder = _Builder(shape, numpy.random.default_rng(0))
    state = builder.embeddings()
    mask_bias = builder.mask_bias() if any(width.heads for width in widths) else ""
    for index, width in enumerate(widths, start=1):
        state = builder.layer(state, mask_bias, width, last_for_first_only and index == len(widths))
    builder.nodes.append(helper.make_node("Identity", [builder.head(state)], ["logits"]))
    graph = helper.make_graph(
        builder.nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in INPUTS],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", shape.classes])],
        builder.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", shape.deployment.opset)])
    model.ir_version = 10  # OpenVINO and ONNX Runtime both read it
    onnx.save(model, path)

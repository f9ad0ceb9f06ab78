"""How much faster a candidate really is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from stages.core.latency import INPUTS, LatencyTable, open_bare, texts_a_second
from stages.core.onnx_graph import export_onnx
from stages.core.quantized import ActivationRange, QuantizedLinear, replace_module
from stages.core.runtimes import ONNX_FILE, Batch, Goal, Runtime
from stages.core.structure import quantizable_linears
from stages.core.timing import ratios

Clock = Callable[[nn.Module], float]
"""Measured speedup of a model over the stage's input."""

_ROUNDS = 15
_OPSET = 20
_ANY_RANGE = ActivationRange.covering(-4.0, 4.0)  # the values decide nothing about time


@contextmanager
def deployment_clock(
    parent: nn.Module, table: LatencyTable, goal: Goal, batches: Sequence[Batch], seed: int
) -> Iterator[Clock]:
    """Export models as they will be deployed, and time them in turns with the parent.

    Args:
        parent: the stage's input.
        table: names the runtime, and whether models are deployed in int8.
        goal: one text at a time, or batches.
        batches: real texts.
        seed: of the order of measurement.
    """
    with tempfile.TemporaryDirectory(prefix="headroom-") as name:

        def deploy(model: nn.Module) -> Runtime:
            folder = Path(tempfile.mkdtemp(dir=name))
            export_onnx(deployment_form(model, table.quantized), folder / ONNX_FILE, INPUTS, "logits", _OPSET)
            return open_bare(folder, table.runtime, goal)

        reference = deploy(parent)

        def speedup(model: nn.Module) -> float:
            speeds = texts_a_second({"parent": reference, "candidate": deploy(model)}, batches, goal, _ROUNDS, seed)
            return ratios(speeds["candidate"], speeds["parent"])["median"]

        yield speedup


def deployment_form(model: nn.Module, quantized: bool) -> nn.Module:
    """Copy a model, the linear layers of encoder and pooler in int8 with made-up ranges where it is to be quantized."""
    form = copy.deepcopy(model).eval()
    if not quantized:
        return form
    for name in quantizable_linears(form):
        linear: Any = form.get_submodule(name)
        replace_module(form, name, QuantizedLinear.from_linear(linear, _ANY_RANGE))
    return form

"""How much faster a candidate really is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from stages.core.latency import INPUTS, Deployment, LatencyTable, open_bare, texts_a_second
from stages.core.onnx_graph import export_onnx
from stages.core.quantized import ActivationRange, QuantizedEmbedding, QuantizedLinear, replace_module
from stages.core.runtimes import ONNX_FILE, Batch, Goal, Runtime
from stages.core.structure import quantizable_linears
from stages.core.timing import ratios
from stages.core.training.devices import on_first

Clock = Callable[[nn.Module], float]
"""Measured speedup of a model over the stage's input."""

_ROUNDS = 15
_ANY_RANGE = ActivationRange.covering(-4.0, 4.0)  # the values decide nothing about time


@contextmanager
def deployment_clock(
    parent: nn.Module, table: LatencyTable, goal: Goal, batches: Sequence[Batch], seed: int
) -> Iterator[Clock]:
    """Export models as they will be deployed, and time them in turns with the parent.

    Args:
        parent: the stage's input.
        table: names the runtime, and the form in which models are deployed.
        goal: one text at a time, or batches.
        batches: real texts.
        seed: of the order of measurement.
    """
    with tempfile.TemporaryDirectory(prefix="headroom-") as name:

        def deploy(model: nn.Module) -> Runtime:
            folder = Path(tempfile.mkdtemp(dir=name))
            form = deployment_form(model, table.deployment)
            export_onnx(form, folder / ONNX_FILE, INPUTS, "logits", table.deployment.opset)
            return open_bare(folder, table.runtime, goal)

        reference = deploy(parent)

        def speedup(model: nn.Module) -> float:
            candidate = deploy(model)
            speeds = on_first(
                lambda: texts_a_second({"parent": reference, "candidate": candidate}, batches, goal, _ROUNDS, seed)
            )
            return ratios(speeds["candidate"], speeds["parent"])["median"]

        yield speedup


def deployment_form(model: nn.Module, deployment: Deployment) -> nn.Module:
    """Copy a model as the quantize stage would make it, with made-up ranges of the activations."""
    form = copy.deepcopy(model).eval()
    if deployment.quantized:
        for name in quantizable_linears(form):
            linear: Any = form.get_submodule(name)
            replace_module(form, name, QuantizedLinear.from_linear(linear, _ANY_RANGE))
    if deployment.int8_embeddings:
        for name, part in list(form.named_modules()):
            if isinstance(part, nn.Embedding):
                replace_module(form, name, QuantizedEmbedding.from_embedding(part))
    return form

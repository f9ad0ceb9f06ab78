"""Quantization-aware training: the float model learns to live with rounding, from its own answers.

Rounding passes gradients straight through; the step of every activation is learned (LSQ, 1902.08153), that of the
weights follows their largest value. Embeddings that are int8 already stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core.examples import Examples
from stages.core.judging import judge, predict_logits
from stages.core.params import QuantizedTrainingParams
from stages.core.quantized import (
    ACTIVATION_LEVELS,
    ActivationRange,
    QuantizedLinear,
    quantize_weight,
    replace_module,
    weight_scales,
)
from stages.core.stage import StageRun
from stages.core.tasks import Task
from stages.core.tensors import pad_tensors, shuffled_batches
from stages.core.training.loop import train
from stages.core.training.recipe import Batch, Recipe, Tensors


class FakeQuantizedLinear(nn.Module):
    """What `QuantizedLinear` computes, with gradients."""

    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, activations: ActivationRange, input_scale: Tensor | None, limit: int):
        super().__init__()
        self.linear = linear
        self.step = nn.Parameter(torch.tensor([activations.scale]))
        self.zero_point, self.limit = activations.zero_point, limit
        self.register_buffer("input_scale", input_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to float inputs [..., in features]."""
        weight = self.linear.weight
        if self.input_scale is not None:
            inputs, weight = inputs * self.input_scale, weight / self.input_scale
        scales = weight_scales(weight.detach(), self.limit)
        rounded = quantize_weight(weight.detach(), scales, self.limit) * scales[:, None]
        return functional.linear(self._round(inputs), weight + (rounded - weight).detach(), self.linear.bias)

    def quantized(self) -> QuantizedLinear:
        """Round for good."""
        chosen = ActivationRange(self.step.item(), self.zero_point)
        return QuantizedLinear.from_linear(self.linear, chosen, self.input_scale, self.limit)

    def _round(self, inputs: Tensor) -> Tensor:
        share = 1.0 / math.sqrt(inputs.numel() * ACTIVATION_LEVELS)
        step = self.step * share + (self.step * (1.0 - share)).detach()  # LSQ section 2.2: a smaller gradient
        levels = (inputs / step).clamp(-self.zero_point, ACTIVATION_LEVELS - self.zero_point)
        return (levels + (levels.round() - levels).detach()) * step


def train_quantized(
    model: nn.Module,
    teacher: nn.Module,
    ranges: Mapping[str, ActivationRange],
    factors: Mapping[str, Tensor],
    limit: int,
    examples: Examples,
    validation: Examples,
    task: Task,
    pad_id: int,
    params: QuantizedTrainingParams,
    run: StageRun,
) -> tuple[nn.Module, dict[str, ActivationRange]]:
    """Train with rounding simulated.

    Args:
        model: float, with embeddings as they will be; left as it is, though its tensors may be shared.
        teacher: the float model.
        ranges: of the inputs of the layers to round.
        factors: of the inputs, where layers multiply them.
        limit: largest level of a weight.
        examples: to learn on; their labels are not used.
        validation: chooses the best epoch.
        task: for the losses.
        pad_id: token id that fills short texts.
        params: how long and how fast.
        run: of the stage.

    Returns:
        the trained model in float, and the ranges learned.
    """
    wanted, student = predict_logits(teacher, examples.input_ids, pad_id), _simulate(model, ranges, factors, limit)

    def prepare(batch: Batch) -> Tensors:
        return {**pad_tensors([examples.input_ids[i] for i in batch], pad_id), "wanted": wanted[list(batch)]}

    def loss(tensors: Tensors) -> Tensor:
        logits: Any = student(tensors["input_ids"], tensors["attention_mask"]).logits
        return task.soft_loss(logits.float(), tensors["wanted"], params.temperature)

    lengths, seed = [len(row) for row in examples.input_ids], run.params.seed
    recipe = Recipe(
        optimizer=params.optimizer,
        rounds=params.epochs,
        batches=lambda epoch: shuffled_batches(lengths, params.optimizer.batch_tokens, seed * 1000 + epoch),
        prepare=prepare,
        loss=loss,
        evaluate=lambda: judge(student, task, run.params.quality.metric, validation, pad_id),
    )
    train(student, recipe, run, "quantized")
    learned: dict[str, ActivationRange] = {}
    for name in ranges:
        layer: Any = student.get_submodule(name)
        learned[name] = layer.quantized().activations
        replace_module(student, name, layer.linear)
    return student, learned


def _simulate(
    model: nn.Module, ranges: Mapping[str, ActivationRange], factors: Mapping[str, Tensor], limit: int
) -> nn.Module:
    student = copy.deepcopy(model)
    for name, chosen in ranges.items():
        linear: Any = student.get_submodule(name)
        replace_module(student, name, FakeQuantizedLinear(linear, chosen, factors.get(name), limit))
    return student

"""The recipes: each makes a quantized model out of the float one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_pad_id, sample
from stages.core.judging import predict_logits
from stages.core.observe.progress import track
from stages.core.quantized import (
    SEVEN_BIT_LIMIT,
    WEIGHT_LIMIT,
    ActivationRange,
    GroupedLinear,
    HalfEmbedding,
    HalfLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    quantized_parts,
    replace_module,
)
from stages.core.stage import StageRun
from stages.core.structure import quantizable_linears
from stages.core.tasks import get_task
from stages.quantize.bits import needed_bits
from stages.quantize.gate import Verdict, judge_recipe
from stages.quantize.groups import gptq_in_steps, group_size, round_groups
from stages.quantize.observe import collect_inputs
from stages.quantize.search import answers_moved, fewest_in_float
from stages.quantize.smooth import Smoothed, smooth
from stages.quantize.train import train_quantized

Parts = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Attempt:
    """What a recipe made."""

    model: nn.Module
    in_float: list[str] = field(default_factory=list)
    """Layers and embeddings that could have been quantized and were not."""
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was chosen or measured for every layer."""


class Kitchen:
    """What recipes share: the float model, the calibration texts, and what was already worked out of them."""

    def __init__(self, run: StageRun, model: nn.Module):
        self.run, self.model, self.params = run, model, run.params.quantize
        self.task, self.pad_id = get_task(run.params.task.kind), load_pad_id(run.inputs["data"], run.inputs["model"])
        self.validation = load_examples(run.inputs["data"], "validation", run.inputs["model"])
        self.limit = SEVEN_BIT_LIMIT if needed_bits(self.params.weight_bits) == 7 else WEIGHT_LIMIT

    @cached_property
    def layers(self) -> list[str]:
        """Names of the linear layers to quantize."""
        return quantizable_layers(self.model)

    @cached_property
    def wanted(self) -> Tensor:
        """Logits of the float model on the validation texts."""
        return predict_logits(self.model, self.validation.input_ids, self.pad_id)

    @cached_property
    def train(self) -> Examples:
        """Training texts."""
        return load_examples(self.run.inputs["data"], "train", self.run.inputs["model"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What flows into the layers on the calibration texts."""
        texts = sample(self.train, self.params.calibration_texts, self.run.params.seed)
        return collect_inputs(self.model, self.layers, texts.input_ids, self.pad_id)

    @cached_property
    def static(self) -> Smoothed:
        """Ranges and smoothing of static int8, trained where params ask for it."""
        params = self.params
        smoothed = smooth(self.model, self.inputs, params.smoothing, params.activations, self.limit)
        if not params.training.epochs:
            return smoothed
        base = with_parts(smoothed.model, self.embeddings)
        trained, ranges = train_quantized(
            base, self.model, smoothed.ranges, smoothed.factors, self.limit, self.train, self.validation, self.task,
            self.pad_id, params.training, self.run,
        )  # fmt: skip
        for name in self.embeddings:
            replace_module(trained, name, self.model.get_submodule(name))
        return Smoothed(trained, ranges, smoothed.factors, smoothed.strengths)

    @cached_property
    def static_parts(self) -> dict[str, nn.Module]:
        """Every part of static int8."""
        return {**{name: self.static_linear(name, None) for name in self.layers}, **self.embeddings}

    def static_linear(self, name: str, group: int | None) -> QuantizedLinear:
        """Quantize a layer to static int8, stored in 4 bits where there is a group."""
        static = self.static
        linear, ranges, factor = _linear(static.model, name), static.ranges[name], static.factors.get(name)
        return QuantizedLinear.from_linear(linear, ranges, factor, self.limit, group)

    @cached_property
    def embeddings(self) -> dict[str, nn.Module]:
        """Embeddings in int8, or none where params leave them in float."""
        if self.params.embeddings == "float":
            return {}
        return {name: QuantizedEmbedding.from_embedding(_embedding(self.model, name)) for name in self.tables}

    @cached_property
    def tables(self) -> list[str]:
        """Names of the embeddings."""
        return [name for name, part in self.model.named_modules() if isinstance(part, nn.Embedding)]

    def verdict(self, model: nn.Module) -> Verdict:
        """Ask the gate about a model."""
        logits = predict_logits(model, self.validation.input_ids, self.pad_id)
        metric, seed = self.run.params.quality.metric, self.run.params.seed
        return judge_recipe(metric, self.wanted, logits, self.validation.labels, self.params.gate, seed)


def int8_static(kitchen: Kitchen) -> Attempt:
    """Quantize weights and activations, ranges fixed by calibration."""
    layers = {"smoothing_strength": kitchen.static.strengths}
    return Attempt(with_parts(kitchen.static.model, kitchen.static_parts), [], layers)


def int8_packed(kitchen: Kitchen) -> Attempt:
    """Quantize as `int8_static`, with weights and tables stored in 4 bits where a row divides into groups."""
    wanted, layers = kitchen.params.weight_only.group, {"smoothing_strength": kitchen.static.strengths}
    base: Any = kitchen.static.model
    parts: dict[str, nn.Module] = {}
    for name in track(kitchen.layers, "4-bit storage"):
        parts[name] = _in_steps(kitchen, name, group_size(_linear(base, name).in_features, wanted))
    for name, part in kitchen.embeddings.items():
        table = _embedding(base, name)
        # Tables of positions and kinds are small, and every token adds one of their rows: they stay as they are. Rows
        # of words are looked up, not summed, so their errors do not add up and wider groups will do.
        group = group_size(table.embedding_dim, 2 * wanted) if table is base.get_input_embeddings() else None
        parts[name] = part if group is None else QuantizedEmbedding.from_embedding(table, group)
    return Attempt(with_parts(base, parts), [], layers)


def int8_mixed(kitchen: Kitchen) -> Attempt:
    """Quantize as `int8_static`, with the fewest layers left in float that pass the gate."""
    base, parts = kitchen.static.model, kitchen.static_parts
    base_logits = predict_logits(base, kitchen.validation.input_ids, kitchen.pad_id)

    def moved(name: str) -> float:
        alone = with_parts(base, {name: parts[name]})
        return answers_moved(base_logits, predict_logits(alone, kitchen.validation.input_ids, kitchen.pad_id))

    def without(names: Sequence[str]) -> nn.Module:
        return with_parts(base, {name: part for name, part in parts.items() if name not in names})

    sensitivity = {name: moved(name) for name in track(list(parts), "sensitivity")}
    order = sorted(parts, key=lambda name: -sensitivity[name])
    most = int(kitchen.params.float_share * len(parts))
    found = fewest_in_float(order, most, lambda names: kitchen.verdict(without(names)).passed)
    in_float = order[:most] if found is None else found
    layers = {"smoothing_strength": kitchen.static.strengths, "sensitivity_nats": sensitivity}
    return Attempt(without(in_float), in_float, layers)


def int8_dynamic(kitchen: Kitchen) -> Attempt:
    """Quantize weights and activations, ranges taken from each input."""
    linears = {
        name: QuantizedLinear.from_linear(_linear(kitchen.model, name), None, None, kitchen.limit)
        for name in kitchen.layers
    }
    return Attempt(with_parts(kitchen.model, {**linears, **kitchen.embeddings}))


def int8_weights(kitchen: Kitchen) -> Attempt:
    """Round weights to 8 bits in groups; activations stay float."""
    return _weights_only(kitchen, 8)


def int4_weights(kitchen: Kitchen) -> Attempt:
    """Round weights to 4 bits in groups; activations stay float."""
    return _weights_only(kitchen, 4)


def bf16(kitchen: Kitchen) -> Attempt:
    """Hold weights in bfloat16."""
    return _half(kitchen, "bf16")


def fp16(kitchen: Kitchen) -> Attempt:
    """Hold weights in float16."""
    return _half(kitchen, "fp16")


RECIPES: dict[str, Callable[[Kitchen], Attempt]] = {
    recipe.__name__: recipe
    for recipe in (int8_packed, int8_static, int8_mixed, int8_dynamic, int8_weights, int4_weights, bf16, fp16)
}


def quantize_model(model: nn.Module, ranges: Mapping[str, ActivationRange | None]) -> nn.Module:
    """Copy a model with the named linear layers in int8; a range of None is taken from each input."""
    return with_parts(
        model, {name: QuantizedLinear.from_linear(_linear(model, name), chosen) for name, chosen in ranges.items()}
    )


def with_parts(model: nn.Module, parts: Parts) -> nn.Module:
    """Copy a model with other modules in the named places; the copy shares all tensors, so neither may be trained."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    changed = copy.deepcopy(model, shared)
    for name, part in parts.items():
        replace_module(changed, name, part)
    return changed.eval()


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the encoder and its pooler; the output layer stays in float.

    Raises:
        UserError: if parts of the model are quantized already.
    """
    if quantized_parts(model):
        raise UserError("quantize: the checkpoint is quantized already; give the stage a float one")
    return quantizable_linears(model)


def _in_steps(kitchen: Kitchen, name: str, group: int | None) -> QuantizedLinear:
    layer = kitchen.static_linear(name, group)
    if group is not None and kitchen.params.weight_only.method == "gptq":
        weight, inputs = _linear(kitchen.static.model, name).weight.detach(), kitchen.inputs[name]
        if layer.input_scale is not None:
            weight, inputs = weight / layer.input_scale, inputs * layer.input_scale
        units = weight / layer.weight_scale[:, None]
        layer.hold_steps(*gptq_in_steps(units, inputs, group, kitchen.limit))
    return layer


def _weights_only(kitchen: Kitchen, bits: int) -> Attempt:
    parts: dict[str, nn.Module] = {}
    for name in track(kitchen.layers, f"{bits}-bit weights"):
        linear = _linear(kitchen.model, name)
        group = group_size(linear.in_features, kitchen.params.weight_only.group)
        if group is not None:
            weight = linear.weight.detach()
            rounded = round_groups(weight, kitchen.inputs[name], bits, group, kitchen.params.weight_only)
            parts[name] = GroupedLinear.from_levels(linear, rounded.levels, rounded.zero_point, rounded.scale, bits)
    in_float = [name for name in kitchen.layers if name not in parts]
    return Attempt(with_parts(kitchen.model, {**parts, **kitchen.embeddings}), in_float)


def _half(kitchen: Kitchen, half: str) -> Attempt:
    model = kitchen.model
    linears = {name: HalfLinear.from_linear(_linear(model, name), half) for name in kitchen.layers}
    tables = {name: HalfEmbedding.from_embedding(_embedding(model, name), half) for name in kitchen.tables}
    return Attempt(with_parts(model, {**linears, **tables}))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    part: Any = model.get_submodule(name)
    return part  # type: ignore[no-any-return]


def _embedding(model: nn.Module, name: str) -> nn.Embedding:
    part: Any = model.get_submodule(name)
    return part  # type: ignore[no-any-return]

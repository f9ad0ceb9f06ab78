"""Command line of the quantize stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from stages.core.checkpoints import count_parameters, extend_lineage, load_model, save_model
from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_pad_id, sample
from stages.core.judging import predict_logits, validation_quality
from stages.core.observe.progress import track
from stages.core.quantized import ActivationRange, QuantizedLinear, replace_module
from stages.core.stage import StageRun, command
from stages.core.structure import encoder_layers
from stages.core.tasks import get_task
from stages.quantize.observe import choose_range, collect_inputs

Ranges = Mapping[str, ActivationRange | None]


def run_quantize(run: StageRun) -> dict[str, Any]:
    """Quantize, and give layers back to float until the loss is tolerated; or hand the checkpoint on."""
    params, data = run.params.quantize, run.inputs["data"]
    task, pad_id, metric = (
        get_task(run.params.task.kind),
        load_pad_id(data, run.inputs["model"]),
        run.params.quality.metric,
    )
    model, validation = load_model(run.inputs["model"]), load_examples(data, "validation", run.inputs["model"])
    before = validation_quality(model, task, validation, pad_id)
    in_float: list[str] = []
    after, quantized = before, model
    if params.enabled:
        ranges = _ranges(run, model, pad_id)
        order: list[str] | None = None
        while True:
            quantized = quantize_model(model, {name: ranges[name] for name in ranges if name not in in_float})
            after = validation_quality(quantized, task, validation, pad_id)
            run.say(
                f"{metric} {before[metric]:.4f} in float, {after[metric]:.4f} with {len(in_float)} layers left in float"
            )
            if before[metric] - after[metric] <= params.tolerated_loss or len(in_float) == len(ranges):
                break
            order = order or _most_sensitive_first(model, ranges, validation, pad_id)
            in_float.append(order[len(in_float)])
    save_model(quantized, run.unit("model"), run.inputs["model"], extend_lineage(run.inputs["model"], "quantize"))
    return {
        "parameters": count_parameters(quantized),
        "before": before,
        "validation": after,
        "quantized_layers": sum(isinstance(module, QuantizedLinear) for module in quantized.modules()),
        "float_layers": in_float,
    }


def quantize_model(model: nn.Module, ranges: Ranges) -> nn.Module:
    """Copy a model with the named linear layers in int8."""
    quantized = copy.deepcopy(model)
    for name, activations in ranges.items():
        linear: Any = quantized.get_submodule(name)
        replace_module(quantized, name, QuantizedLinear.from_linear(linear, activations))
    return quantized.eval()


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the encoder and its pooler; the output layer stays in float."""
    inside = {id(part) for layer in encoder_layers(model) for part in layer.modules()}
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and (id(part) in inside or "pooler" in name)
    ]
    if any(isinstance(part, QuantizedLinear) for part in model.modules()):
        raise UserError("quantize: the checkpoint is quantized already; give the stage a float one")
    return names


def _ranges(run: StageRun, model: nn.Module, pad_id: int) -> dict[str, ActivationRange | None]:
    params, names = run.params.quantize, quantizable_layers(model)
    if params.activations.mode == "dynamic":
        return dict.fromkeys(names)
    train = load_examples(run.inputs["data"], "train", run.inputs["model"])
    calibration = sample(train, params.calibration_texts, run.params.seed)
    inputs = collect_inputs(model, names, calibration.input_ids, pad_id)
    return {name: choose_range(inputs[name], params.activations) for name in track(names, "calibrate")}


def _most_sensitive_first(model: nn.Module, ranges: Ranges, validation: Examples, pad_id: int) -> list[str]:
    """Order layers by how far each alone, in int8, moves the answers (Kullback-Leibler divergence)."""
    wanted = predict_logits(model, validation.input_ids, pad_id)

    def divergence(name: str) -> float:
        logits = predict_logits(quantize_model(model, {name: ranges[name]}), validation.input_ids, pad_id)
        return _divergence(wanted, logits)

    hurts = {name: divergence(name) for name in track(list(ranges), "sensitivity")}
    return sorted(hurts, key=lambda name: -hurts[name])


def _divergence(wanted: Tensor, logits: Tensor) -> float:
    first, second = functional.log_softmax(wanted, dim=-1), functional.log_softmax(logits, dim=-1)
    return float(functional.kl_div(second, first, log_target=True, reduction="batchmean"))


if __name__ == "__main__":
    command("quantize", run_quantize, inputs=("model", "data"))

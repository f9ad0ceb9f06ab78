"""Few trained parameters in a frozen model: LoRA, AdaLoRA and (IA)^3 through peft, bottleneck adapters and prefixes.

peft's tuners are put into the model itself, so that it stays the class that the other stages know, and are merged into
its weights when training ends: what leaves the stage is an ordinary checkpoint. peft has no bottleneck adapters for
encoders, and its prefix tuning moves the positions of the texts and is no part of the model's modules, which loading
and export go by; these two are built in `stages/core/added.py` and stay in the model, as neither can be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, IA3Config, IA3Model, LoraConfig, LoraModel
from torch import Tensor, nn

from stages.core.added import add_bottlenecks, add_prefixes
from stages.core.errors import UserError
from stages.core.params import AdaLoraParams, AdaptersParams, EfficientParams, Ia3Params, LoraParams, PrefixParams
from stages.core.structure import (
    attention_linears,
    attention_output,
    encoder_layers,
    is_compressible,
    neuron_input,
    neuron_output,
)

_NAME = "default"
"""Of the one tuner, as peft calls it."""
_STEPS_BETWEEN_ALLOCATIONS = 10


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Tuning:
    """What a way of training few parameters asks of the training loop, and how it ends."""

    after_step: Callable[[int], None] | None = None
    """As in `Recipe`."""
    penalty: Callable[[], Tensor] | None = None
    """To be added to the loss."""
    finish: Callable[[], None] = _nothing
    """Makes the trained model the one that leaves the stage: merges what can be merged, in place."""


def make_efficient(model: nn.Module, params: EfficientParams | None, steps: int) -> Tuning:
    """Freeze a model but for its head, and add the parameters that are trained instead, in place.

    Args:
        model: of transformers, with its head.
        params: None leaves the model as it is, to be trained as a whole.
        steps: of the whole training run.

    Raises:
        UserError: if the model has no such layers, or the steps are too few.
    """
    if params is None:
        return Tuning()
    model.requires_grad_(False)
    tuning = _add(model, params, steps)
    for part in head_parts(model):
        part.requires_grad_(True)
    return tuning


def count_trained(model: nn.Module) -> int:
    """Count the parameters that training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def head_parts(model: nn.Module) -> list[nn.Module]:
    """Find what lies above the encoder: the pooler, which pretraining leaves out, and the task's head."""
    body: Any = getattr(model, str(model.base_model_prefix))
    pooler = getattr(body, "pooler", None)
    return [*([] if pooler is None else [pooler]), *(part for part in model.children() if part is not body)]


def _add(model: nn.Module, params: EfficientParams, steps: int) -> Tuning:
    match params:
        case LoraParams():
            return _lora(model, params)
        case AdaLoraParams():
            return _adalora(model, params, steps)
        case Ia3Params():
            return _ia3(model)
        case AdaptersParams():
            add_bottlenecks(_layers(model), params.width)
        case PrefixParams():
            add_prefixes(_layers(model), params.length)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in (".dropout.down.", ".dropout.up.", ".prefix_")))
    return Tuning()


def _lora(model: nn.Module, params: LoraParams) -> Tuning:
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=params.dropout,
        target_modules=target_names(model, params.targets),
    )
    return Tuning(finish=_merging(LoraModel(model, config, _NAME)))


def _ia3(model: nn.Module) -> Tuning:
    """Factors on keys, values, and what goes into the second feed-forward projection, as in the paper."""
    layers, name_of = _layers(model), {id(part): name for name, part in model.named_modules()}
    inner = [name_of[id(neuron_output(layer))] for layer in layers]
    read = [name_of[id(linear)] for layer in layers for linear in attention_linears(layer)[1:]]
    config = IA3Config(target_modules=[*read, *inner], feedforward_modules=inner)
    return Tuning(finish=_merging(IA3Model(model, config, _NAME)))


def _adalora(model: nn.Module, params: AdaLoraParams, steps: int) -> Tuning:
    warmup, cooldown = round(params.warmup * steps), round(params.cooldown * steps)
    if warmup + cooldown >= steps:
        raise UserError(f"finetune.efficient: ranks cannot fall over {steps} steps; train for more epochs")
    config = AdaLoraConfig(
        init_r=params.start_rank,
        target_r=params.rank,
        lora_alpha=params.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=params.dropout,
        target_modules=target_names(model, params.targets),
        total_step=steps,
        tinit=warmup,
        tfinal=cooldown,
        deltaT=_STEPS_BETWEEN_ALLOCATIONS,
    )
    tuner = AdaLoraModel(model, config, _NAME)
    model.add_module(_MEMORY, RankMemory(tuner))
    merge = _merging(tuner)

    def finish() -> None:
        delattr(model, _MEMORY)
        merge()

    return Tuning(
        after_step=tuner.update_and_allocate,
        penalty=lambda: params.orthogonality * overlap(model),
        finish=finish,
    )


def overlap(model: nn.Module) -> Tensor:
    """How far AdaLoRA's thin matrices are from orthonormal: the mean over them of |P^T P - 1| (2303.10512, equation 4).

    peft adds it only to a loss that the model computes itself.
    """
    norms = []
    for name, matrix in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            products = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            norms.append(torch.linalg.norm(products - torch.eye(len(products), device=matrix.device)))
    return torch.stack(norms).mean()


_MEMORY = "rank_memory"


class RankMemory(nn.Module):
    """What AdaLoRA remembers of its ranks, as a part of the model: so a saved state holds it, and a resumed run goes on
    with the same ranks.
    """

    def __init__(self, tuner: AdaLoraModel):
        super().__init__()
        self._tuner = [tuner]  # in a list, or the tuner's model would be a part of this part of it

    def get_extra_state(self) -> Tensor:
        """Sensitivities and uncertainties of all parameters, then which ranks are left; one after the other."""
        allocator, pattern = self._allocator(), self._config().rank_pattern or {}
        parts: list[Tensor] = []
        for name, parameter in self._thin():
            for averages in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
                parts.append(averages.get(name, torch.zeros_like(parameter)).flatten())
        for name, parameter in self._thin():
            if ".lora_E." in name:
                left = pattern.get(name, [True] * len(parameter))
                parts.append(torch.tensor(left, dtype=parameter.dtype, device=parameter.device))
        return torch.cat([part.detach() for part in parts])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave."""
        allocator, pattern, start = self._allocator(), {}, 0
        for name, parameter in self._thin():
            first, second = state[start : start + 2 * parameter.numel()].clone().view(2, *parameter.shape)
            allocator.ipt[name] = torch.zeros_like(first)
            allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name] = first, second
            start += 2 * parameter.numel()
        for name, parameter in self._thin():
            if ".lora_E." in name:
                pattern[name] = state[start : start + len(parameter)].bool().tolist()
                start += len(parameter)
        self._config().rank_pattern = pattern

    def _allocator(self) -> Any:
        return self._tuner[0].rankallocator

    def _config(self) -> Any:
        return self._tuner[0].peft_config[_NAME]

    def _thin(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, part) for name, part in self._tuner[0].model.named_parameters() if "lora_" in name]


def target_names(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Find the linear layers that get a tuner, by name.

    Args:
        model: of transformers.
        targets: attention, feed_forward or all; or ends of the names of layers below the head.

    Raises:
        UserError: if the model has no such layers.
    """
    names = {id(part): name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if isinstance(targets, str):
        return [names[id(linear)] for layer in _layers(model) for linear in _linears(layer, targets)]
    above = {id(part) for head in head_parts(model) for part in head.modules()}
    below = [name for identity, name in names.items() if identity not in above]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in below):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in below}))
            raise UserError(
                f"finetune.efficient.targets: no linear layer's name ends in {target!r}; they end in {known}"
            )
    return [name for name in below if any(f".{name}".endswith(f".{target}") for target in targets)]


def _linears(layer: nn.Module, targets: str) -> list[nn.Linear]:
    attention = [*attention_linears(layer), attention_output(layer)]
    feed_forward = [neuron_input(layer), neuron_output(layer)]
    return {"attention": attention, "feed_forward": feed_forward, "all": attention + feed_forward}[targets]


def _layers(model: nn.Module) -> list[nn.Module]:
    if not is_compressible(model):
        config: Any = model.config
        raise UserError(
            f"finetune.efficient: the layers of model_type {config.model_type} are not known here; take lora or "
            "adalora with targets by name, such as [q_lin, v_lin], or set it to null"
        )
    return list(encoder_layers(model))


def _merging(tuner: Any) -> Callable[[], None]:
    def merge() -> None:
        tuner.merge_and_unload()

    return merge

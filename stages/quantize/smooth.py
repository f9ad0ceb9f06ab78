"""SmoothQuant (2211.10438): what makes activations hard to round moves into the weights.

Each input channel j of a linear layer is divided by s_j, and the weights that meet it are multiplied by s_j, which
changes nothing before rounding. Dividing costs nothing where the layer before takes it over exactly. In a post-norm
encoder that is one place: the value projection before the attention output, because attention mixes tokens and never
channels. Everywhere else it is not exact or not free: layer norm also feeds the residual, and GELU is not
homogeneous. There the division is a multiplication of its own, made only where it takes away enough of the error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core.added import PrefixedAttention
from stages.core.observe.progress import track
from stages.core.params import ActivationParams, SmoothingParams
from stages.core.quantized import ActivationRange, quantize, quantize_weight, weight_scales
from stages.core.structure import attention_linears, attention_output, encoder_layers
from stages.quantize.observe import choose_range

_SMALLEST = 1e-5


@dataclass(frozen=True)
class Site:
    """Linear layers that read the same input, and so are smoothed alike."""

    readers: list[str]
    writer: str | None
    """Layer whose output channels are the input's, and which can take a factor over exactly."""


@dataclass(frozen=True)
class Smoothed:
    """A model in which the factors that cost nothing are folded, and those that do not for the layers to apply."""

    model: nn.Module
    ranges: dict[str, ActivationRange]
    """Of every reader's input, after its factors."""
    factors: dict[str, Tensor]
    """For readers that multiply their input: by what, [in features]."""
    strengths: dict[str, float]
    """Chosen for every reader."""


def smooth(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    smoothing: SmoothingParams,
    activations: ActivationParams,
    limit: int,
) -> Smoothed:
    """Choose the strength of every site by the error of its outputs, and fold what can be folded.

    Args:
        model: in float; left as it is.
        inputs: of the layers to quantize, [tokens, in features] each.
        smoothing: the strengths to try.
        activations: how ranges are chosen.
        limit: largest level of a weight.
    """
    folded = copy.deepcopy(model)
    smoothed = Smoothed(folded, {}, {}, {})
    for site in track(find_sites(model, list(inputs)), "smooth"):
        linears: list[Any] = [folded.get_submodule(name) for name in site.readers]
        weights, seen = [linear.weight.detach() for linear in linears], inputs[site.readers[0]]
        tried = {
            strength: _try(seen, weights, strength, activations, limit)
            for strength in sorted({0.0, *smoothing.strengths})
        }
        best = min(tried, key=lambda strength: tried[strength].error)
        enough = 1.0 if site.writer else 1.0 - smoothing.least_gain
        chosen = best if tried[best].error < enough * tried[0.0].error else 0.0
        smoothed.ranges.update(dict.fromkeys(site.readers, tried[chosen].activations))
        smoothed.strengths.update(dict.fromkeys(site.readers, chosen))
        if chosen and site.writer:
            fold(folded, site.writer, site.readers, tried[chosen].divisor)
        elif chosen:
            smoothed.factors.update(dict.fromkeys(site.readers, 1.0 / tried[chosen].divisor))
    return smoothed


def find_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    """Group the named layers by the input they share."""
    name_of = {id(part): name for name, part in model.named_modules()}
    sites: list[Site] = []
    for layer in encoder_layers(model):
        readers = attention_linears(layer)
        sites.append(Site([name_of[id(reader)] for reader in readers], None))
        # A prefix has values that the value projection does not write.
        prefixed = isinstance(layer.get_submodule("attention.self"), PrefixedAttention)
        writer = None if prefixed else name_of[id(readers[-1])]
        sites.append(Site([name_of[id(attention_output(layer))]], writer))
    known = {name for site in sites for name in site.readers}
    return [*sites, *(Site([name], None) for name in names if name not in known)]


def smoothing_divisor(inputs: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """By what each input channel is divided, [in]: max|x|^strength / max|w|^(1 - strength), or 1 where either is 0.

    Args:
        inputs: [tokens, in].
        weights: that meet these inputs, [out, in] each.
        strength: from 0 for none to 1, which gives every channel of the input the same reach.
    """
    if strength == 0.0:
        return torch.ones(inputs.shape[1])
    reach = inputs.abs().amax(dim=0)
    weight_reach = torch.cat(list(weights)).abs().amax(dim=0)
    divisor = reach.pow(strength) / weight_reach.clamp(min=_SMALLEST).pow(1.0 - strength)
    return torch.where((reach > 0) & (weight_reach > 0), divisor.clamp(min=_SMALLEST), 1.0)


def fold(model: nn.Module, writer: str, readers: Sequence[str], divisor: Tensor) -> None:
    """Let the writer's output channels shrink and the readers' weights grow, in place; the product stays the same."""
    source: Any = model.get_submodule(writer)
    with torch.no_grad():
        source.weight /= divisor[:, None]
        if source.bias is not None:
            source.bias /= divisor
        for name in readers:
            reader: Any = model.get_submodule(name)
            reader.weight *= divisor


@dataclass(frozen=True)
class _Trial:
    divisor: Tensor
    activations: ActivationRange
    error: float


def _try(
    inputs: Tensor, weights: Sequence[Tensor], strength: float, activations: ActivationParams, limit: int
) -> _Trial:
    """Round inputs and weights after smoothing, and sum the squared errors of the layers' outputs."""
    divisor = smoothing_divisor(inputs, weights, strength)
    chosen = choose_range(inputs / divisor, activations)
    seen = quantize(inputs / divisor, chosen)
    error = 0.0
    for weight in weights:
        scales = weight_scales(weight * divisor, limit)
        rounded = quantize_weight(weight * divisor, scales, limit) * scales[:, None]
        error += float((functional.linear(seen, rounded) - functional.linear(inputs, weight)).square().sum())
    return _Trial(divisor, chosen, error)

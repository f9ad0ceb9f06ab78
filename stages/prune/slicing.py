"""Fewer numbers for the hidden states (SliceGPT, Ashkboos et al., 2401.15024), in encoders that normalize last.

The paper's models normalize first, by root mean square. There a rotation of the hidden states changes nothing once the
weights around them are rotated too; rotated to their principal components, the least of them can be cut off. Rotations
that differ between blocks turn the residual connection of a block into a matrix.

Our extension is to BERT's kin, which normalize after the residual. There a layer norm is all that happens to the hidden
states between two blocks, and it is

    h = scale * n + shift,   n = M x / rms(M x),   M x = x - mean(x).

n has no mean and a fixed length, so it can be rotated as the paper rotates; scale and shift, which cannot, move on into
what reads h. With B_s [hidden, width] the basis at norm s, everything else follows by multiplying out:

    tables:      embedding rows times B_0
    readers:     W scale B_s
    writers:     B_s' W
    residual:    B_(s+1)' scale B_s, the matrix of a block

The residual matrices are more than the paper needs between equal bases: with scale between them they would be there
even if all bases were the same. They cost width^2 multiplications a token and block, a sixth of a layer of the usual
proportions, more of one that lost heads and neurons. Below some share slicing therefore makes a model slower;
`multiplications` counts them.

Three choices of ours cost nothing and keep more:

- A basis ends in width dimensions whose sum is always zero: its columns are orthonormal rows of the discrete cosine
  transform, without the constant one. So the narrow norm is an ordinary layer norm, which every runtime has a kernel
  for, and the sizes of principal components, which differ by orders of magnitude, are spread evenly over all
  dimensions, as 8-bit activations want them (the idea of QuaRot, 2404.00456). It holds width - 1 components.
- What is cut off is replaced by its mean, which moves into the biases of what reads; so components are those of the
  covariance.
- The norm divides by the energy that is left, so what remains keeps its length.

Bases are found in order, each on what really comes out of the sliced blocks before it, as in the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.examples import load_examples, load_pad_id, sample
from stages.core.judging import validation_quality
from stages.core.observe.progress import track
from stages.core.sliced import Site, find_sites, set_hidden_width, table_names
from stages.core.stage import StageRun
from stages.core.structure import ConstantOutput, EmptyInput, encoder_layers, hidden_width
from stages.core.tasks import get_task
from stages.prune.clock import Clock
from stages.prune.flow import Flow, forward, keep_in, start
from stages.prune.reconstruct import reconstruct


@dataclass(frozen=True)
class Basis:
    """How the normalized states n at one norm are told in fewer numbers, and told back: n = narrow @ matrix.T + center.

    In double precision.
    """

    matrix: Tensor
    """[hidden, width]; its transpose times itself takes the mean away, and does nothing else."""
    center: Tensor
    """[hidden]: mean of what is cut off."""
    energy: float
    """Mean squared length of what is left; of the whole it is the hidden width."""
    kept: float
    """Share of the variance that is left."""


def make_narrow(model: nn.Module, run: StageRun, clock: Clock | None) -> dict[str, Any] | None:
    """Slice a model's hidden states, in place, as params ask; None where they do not.

    Args:
        model: checked by `check_sliceable`, in evaluation mode.
        run: of the stage.
        clock: measures the speedup over the stage's input; None where params name no speed.

    Returns:
        metrics: widths, the share of the variance kept at each norm in the order of the model, multiplications a token,
        the measured speedup or None, and the quality on the validation split.
    """
    params, data = run.params.prune, run.inputs["data"]
    if params.hidden_slicing is None:
        return None
    texts, pad_id = sample(load_examples(data, "train"), params.calibration_texts, run.params.seed), load_pad_id(data)
    dense, hidden, before = copy.deepcopy(model), hidden_width(model), multiplications(model)
    width = narrow_width(hidden, params.hidden_slicing.share, params.hidden_slicing.multiple)
    bases = slice_hidden(model, width, texts.input_ids, pad_id)
    if params.reconstruct:
        reconstruct(model, dense, texts.input_ids, pad_id, bases=[basis.matrix.float() for basis in bases[1:]])
    after, task = multiplications(model), get_task(run.params.task.kind)
    metrics = {
        "width": width,
        "of": hidden,
        "variance_kept": {str(index): basis.kept for index, basis in enumerate(bases)},
        "multiplications": {
            "before": before,
            "after": after,
            "of_residuals": residual_multiplications(model),
            "ratio": after / before,
        },
        "speedup": None if clock is None else clock(model),
        "validation": validation_quality(model, task, load_examples(data, "validation"), pad_id),
    }
    run.say(_describe(metrics))
    return metrics


def narrow_width(hidden: int, share: float, multiple: int) -> int:
    """Width that is left when a share goes, rounded up to a multiple."""
    return min(hidden, math.ceil(round(hidden * (1.0 - share) / multiple, 6)) * multiple)


@torch.no_grad()
def slice_hidden(model: nn.Module, width: int, rows: Sequence[Sequence[int]], pad_id: int) -> list[Basis]:
    """Cut the hidden states of a model to their principal components, in place.

    Args:
        model: checked by `check_sliceable`, in evaluation mode; layers may have any widths.
        width: of the hidden states after the cut; all there is changes nothing but the form.
        rows: token ids of calibration texts.
        pad_id: token id that fills short texts.

    Returns:
        the bases, one a norm.
    """
    bases = find_bases(model, width, rows, pad_id)
    apply_bases(model, bases)
    return bases


@torch.no_grad()
def find_bases(model: nn.Module, width: int, rows: Sequence[Sequence[int]], pad_id: int) -> list[Basis]:
    """Find a basis for every norm, each on what comes out of the sliced blocks before it; the model stays as it is."""
    norms: list[Any] = [model.get_submodule(site.norm) for site in find_sites(model)]
    sums: list[Tensor] = []
    handle = norms[0].register_forward_pre_hook(keep_in(sums))
    flow = start(model, rows, pad_id)
    handle.remove()
    bases = [principal_basis(norms[0], sums, flow.masks, width)]
    flow.states = [narrowed(norms[0], bases[0], x) for x in sums]
    for index, layer in enumerate(track(list(encoder_layers(model)), "slice hidden states")):
        first, second = norms[2 * index + 1], norms[2 * index + 2]
        bases.append(principal_basis(first, _inputs(first, layer, flow), flow.masks, width))
        handle = first.register_forward_hook(_narrowing(bases[-1]))
        sums = _inputs(second, layer, flow)
        handle.remove()
        bases.append(principal_basis(second, sums, flow.masks, width))
        flow.states = [narrowed(second, bases[-1], x) for x in sums]
    return bases


def principal_basis(norm: nn.LayerNorm, sums: Sequence[Tensor], masks: Sequence[Tensor], width: int) -> Basis:
    """Find the principal components of what a norm gives before its scale and shift.

    Args:
        norm: of `hidden` features.
        sums: what goes into it, [batch, length, hidden] each.
        masks: the tokens that count, bool [batch, length] each.
        width: of the basis; it holds one component less, and all of them where it is `hidden`.
    """
    hidden = norm.normalized_shape[0]
    count, total, gram = 0, torch.zeros(hidden).double(), torch.zeros(hidden, hidden).double()
    for given, mask in zip(sums, masks, strict=True):
        seen = nn.functional.layer_norm(given[mask].double(), (hidden,), eps=norm.eps)
        count, total, gram = count + len(seen), total + seen.sum(dim=0), gram + seen.T @ seen
    mean = total / count
    # In coordinates without a mean, so that rounding cannot bring one in.
    plain = cosines(hidden)
    variances, components = torch.linalg.eigh(plain @ (gram / count - torch.outer(mean, mean)) @ plain.T)
    gone = max(0, hidden - width)
    chosen = plain.T @ components[:, gone:]
    center = mean - chosen @ (chosen.T @ mean) if gone else torch.zeros_like(mean)
    lost = float(variances[:gone].clamp(min=0.0).sum())
    return Basis(
        matrix=chosen @ cosines(width),
        center=center,
        energy=max(0.0, hidden - lost - float(center.square().sum())),
        kept=1.0 - lost / float(variances.sum()) if lost else 1.0,
    )


def cosines(size: int) -> Tensor:
    """Orthonormal rows [size - 1, size] whose elements sum to zero: the cosine transform without its constant row."""
    rows, columns = torch.arange(1, size).double()[:, None], torch.arange(size).double()
    return math.sqrt(2.0 / size) * torch.cos(math.pi / size * (columns + 0.5) * rows)


def narrowed(norm: nn.LayerNorm, basis: Basis, sums: Tensor) -> Tensor:
    """What a reader gets to see of a sliced norm, in full width: [..., hidden] to [..., hidden]."""
    matrix = basis.matrix.to(sums.dtype)
    width = matrix.shape[1]
    states = nn.functional.layer_norm(sums @ matrix, (width,), eps=norm.eps) * math.sqrt(basis.energy / width)
    return norm.weight * (states @ matrix.T + basis.center.to(sums.dtype)) + norm.bias


@torch.no_grad()
def apply_bases(model: nn.Module, bases: Sequence[Basis]) -> None:
    """Multiply bases into the weights of a model, in place.

    Args:
        model: not sliced yet.
        bases: of one width, one a norm.
    """
    sites = find_sites(model)
    names = [*table_names(model), *(site.norm for site in sites)]
    names += [name for site in sites for name in (*site.readers, *([f"{site.block}.dense"] if site.block else []))]
    old: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    set_hidden_width(model, bases[0].matrix.shape[1])
    for name in table_names(model):
        _put(model, f"{name}.weight", old[name].weight.double() @ bases[0].matrix, old[name].weight)
    for index, (site, basis) in enumerate(zip(sites, bases, strict=True)):
        norm = old[site.norm]
        _fill_norm(model, site, basis, norm.weight)
        for name in site.readers:
            _fill_reader(model, name, old[name], basis, norm)
        if site.block:
            before = old[sites[index - 1].norm]
            _fill_block(model, site.block, old[f"{site.block}.dense"], bases[index - 1], basis, before)


def multiplications(model: nn.Module) -> int:
    """Count the multiplications that a model's weights take a token, matrices of residuals among them.

    Those of attention between tokens are left out: slicing does not change them.
    """
    linears = [part for layer in encoder_layers(model) for part in layer.modules() if isinstance(part, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


def residual_multiplications(model: nn.Module) -> int:
    """Count those of the residuals alone, in a sliced model."""
    return 2 * len(encoder_layers(model)) * hidden_width(model) ** 2


def _describe(metrics: dict[str, Any]) -> str:
    ratio, speedup = metrics["multiplications"]["ratio"], metrics["speedup"]
    speed = "" if speedup is None else f"measured {speedup:.2f} times as fast as the stage's input; "
    more = " (more than before: narrower layers save less than the residuals' matrices cost)" if ratio > 1.0 else ""
    return (
        f"hidden width {metrics['of']} to {metrics['width']}: "
        f"{speed}{ratio:.2f} times the multiplications a token{more}; accuracy {metrics['validation']['accuracy']:.4f}"
    )


def _inputs(part: nn.Module, layer: nn.Module, flow: Flow) -> list[Tensor]:
    """What goes into a part of a layer."""
    seen: list[Tensor] = []
    handle = part.register_forward_pre_hook(keep_in(seen))
    forward(layer, flow)
    handle.remove()
    return seen


def _narrowing(basis: Basis) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(norm: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return narrowed(norm, basis, inputs[0])

    return hook


def _fill_norm(model: nn.Module, site: Site, basis: Basis, like: Tensor) -> None:
    width = basis.matrix.shape[1]
    _put(model, f"{site.norm}.weight", torch.full((width,), math.sqrt(basis.energy / width), dtype=torch.float64), like)
    _put(model, f"{site.norm}.bias", torch.zeros(width), like)


def _fill_reader(model: nn.Module, name: str, old: Any, basis: Basis, norm: Any) -> None:
    if isinstance(old, EmptyInput):
        return
    weight, scale = old.weight.double(), norm.weight.double()
    _put(model, f"{name}.weight", weight * scale @ basis.matrix, old.weight)
    _put(model, f"{name}.bias", old.bias.double() + weight @ _constant(basis, norm), old.bias)


def _fill_block(model: nn.Module, block: str, old: Any, source: Basis, target: Basis, norm: Any) -> None:
    """Fill a block that reads from basis `source`, normalized by `norm`, and writes in basis `target`."""
    if not isinstance(old, ConstantOutput):
        _put(model, f"{block}.dense.weight", target.matrix.T @ old.weight.double(), old.weight)
    bias = old.bias.double() + _constant(source, norm)
    _put(model, f"{block}.dense.bias", target.matrix.T @ bias, old.bias)
    skip = target.matrix.T * norm.weight.double() @ source.matrix
    _put(model, f"{block}.skip.weight", skip, norm.weight)


def _constant(basis: Basis, norm: Any) -> Tensor:
    """What a reader gets whatever the text says, [hidden]."""
    constant: Tensor = norm.weight.double() * basis.center + norm.bias.double()
    return constant


def _put(model: nn.Module, name: str, values: Tensor, like: Tensor) -> None:
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, nn.Parameter(values.to(like.dtype)))

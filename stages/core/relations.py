"""How tokens of a text relate to each other inside an attention layer, and how far two models differ in it.

A relation is the softmax of scaled products between the projections of every token and every other one. Between
queries and keys, at the layer's own heads, it is the attention map (TinyBERT, 1909.10351; compared by divergence as
in MiniLM, 2002.10957). Between queries and queries, keys and keys, values and values, cut anew into any number of
relation heads, it is what MiniLMv2 (2012.15828) hands over: neither heads nor widths of the two models need be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core.structure import attention_linears, encoder_layers

Projections = dict[int, list[Tensor]]
"""By layer: queries, keys and values, each [texts, length, width]."""


@contextmanager
def recorded_projections(model: nn.Module, layers: Sequence[int]) -> Iterator[Projections]:
    """Record queries, keys and values of some layers while the body runs the model; no layers, no hooks.

    Raises:
        UserError: if the family's parts are not known.
    """
    seen: Projections = {}
    handles = []
    for index in layers:
        seen[index] = [torch.empty(0)] * 3
        for place, linear in enumerate(attention_linears(encoder_layers(model)[index])):
            handles.append(linear.register_forward_hook(_recorder(seen[index], place)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relation_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int, mask: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the student's relation from the teacher's, over heads and real tokens.

    Args:
        student: two projections, each [texts, length, width].
        teacher: two projections, each [texts, length, width of the teacher].
        heads: into which both widths are cut; must divide them.
        mask: true where there is a token, bool [texts, length].
    """
    learnt, wanted = _log_relation(*student, heads, mask), _log_relation(*teacher, heads, mask)
    divergence = functional.kl_div(learnt, wanted, log_target=True, reduction="none").sum(dim=-1)
    return (divergence * mask[:, None, :]).sum() / (mask.sum() * heads)


def _log_relation(one: Tensor, other: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Logarithms of the relation, float32 [texts, heads, length, length]; nothing relates to padding."""
    size = one.shape[-1] // heads
    rows, columns = (tensor.reshape(*mask.shape, heads, size).transpose(1, 2) for tensor in (one, other))
    scores = (rows @ columns.transpose(-1, -2)).float() / size**0.5
    hidden = torch.finfo(torch.float32).min
    return functional.log_softmax(scores.masked_fill(~mask[:, None, None, :], hidden), dim=-1)


def _recorder(kept: list[Tensor], place: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[place] = output

    return record

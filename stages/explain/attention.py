"""Where each layer looks, and what that comes to over all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.structure import encoder_layers
from stages.core.tensors import pad_tensors


def attention_maps(model: nn.Module, input_ids: Sequence[int]) -> list[Tensor | None]:
    """Attention of one text: [heads, tokens, tokens] of each layer, rows sum to one; None where a layer has no heads.

    The maps are taken at each layer rather than from the model's output, which leaves out layers without attention.
    """
    maps: list[Tensor | None] = []

    def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        maps.append(None if output[1] is None else output[1][0])

    parts = [layer.get_submodule("attention.self") for layer in encoder_layers(model)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        with _plain_attention(model), torch.inference_mode():
            model(**pad_tensors([input_ids], 0))
    finally:
        for handle in handles:
            handle.remove()
    return maps


def rollout(maps: Sequence[Tensor | None], tokens: int) -> Tensor:
    """Attention rollout (2005.00928): how much of each input token reaches each token of the last layer.

    A layer hands on half of its input through the residual; one without heads hands on everything.

    Returns:
        [tokens, tokens], rows sum to one.
    """
    flow = torch.eye(tokens)
    for attention in maps:
        if attention is not None:
            mixed = 0.5 * attention.mean(dim=0) + 0.5 * torch.eye(tokens)
            flow = mixed / mixed.sum(dim=-1, keepdim=True) @ flow
    return flow


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Compute attention step by step for a while: the fused kernels never hold the weights."""
    transformer: Any = model
    usual = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(usual)

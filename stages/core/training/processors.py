"""What PyTorch does slowly on processors, done faster while a model trains: attention, dropout and freed memory.

Measured with PyTorch 2.13 on two AVX-512 cores, bf16, 16 blocks of 128 tokens, 12 heads of 32, a layer's attention
forward and backward: 5.3 ms here, 15.4 ms by its own plain products, which also are what dropout on attention weights
falls back to, and 27.3 ms by its flash kernel, whose backward pass is slow on processors. Elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "headroom_products"
_LEVELS = 2**16
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_NEVER = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 2**30


class QuickDropout(nn.Module):
    """Dropout whose chances are drawn four to a random number, seven times as fast as PyTorch's on a processor.

    The probability is rounded to a multiple of 1/65536. The same distribution, but other bits than `nn.Dropout`.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.p = probability

    def forward(self, values: Tensor) -> Tensor:
        """Drop a share of the values and scale the others up; the values themselves when not training."""
        return quick_dropout(values, self.p) if self.training else values


def quick_dropout(values: Tensor, probability: float) -> Tensor:
    """Set each value to zero by chance and divide the others by the chance of staying; see `QuickDropout`."""
    if torch.compiler.is_compiling():
        return nn.functional.dropout(values, probability)
    dropped = round(probability * _LEVELS)
    if not dropped:
        return values
    if dropped >= _LEVELS:
        return values * 0.0
    numbers = torch.empty((values.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    chances = numbers.view(torch.int16)[: values.numel()].view(values.shape)
    kept = (chances >= dropped - _LEVELS // 2).to(values.dtype)
    return values * kept.mul_(_LEVELS / (_LEVELS - dropped))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as two products and a softmax, in the precision of the products.

    Args:
        module: the attention layer.
        query: [texts, heads, length, head size]; key and value may have fewer heads, each shared by several.
        key: [texts, heads, length, head size].
        value: [texts, heads, length, head size].
        attention_mask: added to the scores, or where it is boolean, true where a query may look; broadcast.
        scaling: of the scores; None for one over the root of the head size.
        dropout: probability of an attention weight being dropped.
        position_bias: added to the scores (T5).

    Returns:
        [texts, length, heads, head size], and the weights [texts, heads, length, length].
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if position_bias is not None:
        scores = scores + position_bias.to(scores.dtype)
    if attention_mask is not None:
        scores = scores + _additive(attention_mask, scores.dtype)
    weights = scores.softmax(-1).to(value.dtype)
    kept = quick_dropout(weights, dropout) if dropout else weights
    return (kept @ value).transpose(1, 2).contiguous(), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; what is forbidden gets the lowest number of the type, so that no row is all infinite."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@contextmanager
def quick_on_processors(model: nn.Module) -> Iterator[None]:
    """Train a model with quick attention and dropout where it trains on a processor; it leaves as it came."""
    if torch.accelerator.is_available():  # where the model is about to go
        yield
        return
    keep_freed_memory()
    usual = {
        part: part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == "sdpa"
    }
    dropouts = [
        (owner, name, part)
        for owner in model.modules()
        for name, part in owner.named_children()
        if type(part) is nn.Dropout
    ]
    try:
        for part in usual:
            part.set_attn_implementation(ATTENTION)
        for owner, name, part in dropouts:
            owner.register_module(name, QuickDropout(part.p).train(part.training))
        yield
    finally:
        for part, name in usual.items():
            part.set_attn_implementation(name)
        for owner, name, part in dropouts:
            owner.register_module(name, part.train(owner.training))


def keep_freed_memory() -> None:
    """Have the C library reuse freed tensors, where by default every large one is mapped and zeroed anew.

    The zeroing was a seventh of a training step. The price is a heap that blocks of ever new sizes fragment:
    pretraining MiniLM held 1.7 GB after 7 steps and up to 2.0 GB after 20.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)

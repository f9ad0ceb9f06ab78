"""Small trained parts inside a frozen encoder that no merge can remove: bottleneck adapters and prefixes.

Both sit where the parts that compression moves stay plain: an adapter after the dropout at the end of a block, as
Houlsby et al. put it, and a prefix beside the keys and values that a layer's own linears compute. So heads, neurons and
layers of such a model can be pruned and its linears quantized, the adapters' own among them; only its hidden states
cannot be sliced with adapters in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from stages.core.errors import UserError

_SPREAD = 0.02
"""Standard deviation of new weights, as in BERT."""


class Bottleneck(nn.Module):
    """An adapter (Houlsby et al., 1902.00751): down to a few features, GELU, up again, added to what came in.

    Takes the place of a block's dropout and starts as the identity behind it.
    """

    def __init__(self, hidden: int, width: int, dropout: nn.Module):
        super().__init__()
        self.width = width
        self.dropout, self.down, self.up = dropout, nn.Linear(hidden, width), nn.Linear(width, hidden)
        nn.init.normal_(self.down.weight, std=_SPREAD)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, change: Tensor) -> Tensor:
        """Turn what a block adds to its input, [..., hidden], into what is added instead."""
        change = self.dropout(change)
        adapted: Tensor = change + self.up(functional.gelu(self.down(change)))
        return adapted


class PrefixedAttention(nn.Module):
    """Self-attention that also sees learned keys and values (2101.00190), in every layer (P-Tuning v2, 2110.07602).

    The texts keep their positions. Takes the place of a layer's self-attention and shares its linears.
    """

    def __init__(self, attention: Any, length: int):
        super().__init__()
        self.config, self.is_causal, self.scaling = attention.config, False, attention.scaling
        self.query, self.key, self.value, self.dropout = (
            attention.query,
            attention.key,
            attention.value,
            attention.dropout,
        )
        self.num_attention_heads, self.attention_head_size = (
            attention.num_attention_heads,
            attention.attention_head_size,
        )
        self.all_head_size = attention.all_head_size
        shape = (self.num_attention_heads, length, self.attention_head_size)
        self.prefix_keys = nn.Parameter(torch.empty(shape).normal_(std=_SPREAD))
        self.prefix_values = nn.Parameter(torch.empty(shape).normal_(std=_SPREAD))

    @property
    def length(self) -> int:
        """Keys, and values, learned."""
        return self.prefix_keys.shape[1]

    def keep_heads(self, heads: Tensor) -> None:
        """Remove what the prefix holds for all but the given heads; the linears are cut elsewhere."""
        self.prefix_keys = nn.Parameter(self.prefix_keys.detach()[heads].clone())
        self.prefix_values = nn.Parameter(self.prefix_values.detach()[heads].clone())

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from [batch, length, hidden] to the prefix and itself.

        Returns:
            [batch, length, heads x head size], and where they were computed the attention weights among the text's own
            tokens, rows summing to one.
        """
        batch, tokens = hidden_states.shape[:2]
        shape = (batch, tokens, -1, self.attention_head_size)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in self._linears())
        if attention_mask is not None:
            attention_mask = functional.pad(attention_mask, (self.length, 0), value=_seen(attention_mask))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            with_prefix(self.prefix_keys, key),
            with_prefix(self.prefix_values, value),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
        )
        own = None if weights is None else functional.normalize(weights[..., self.length :], p=1.0, dim=-1)
        return output.reshape(batch, tokens, -1), own

    def _linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value


def with_prefix(prefix: Tensor, own: Tensor) -> Tensor:
    """Put a prefix [heads, length, size] before keys or values [batch, heads, tokens, size]."""
    return torch.cat([prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)


def add_bottlenecks(layers: Iterable[Any], width: int) -> None:
    """Put an adapter at the end of both blocks of each encoder layer, in place."""
    for layer in layers:
        for block in (layer.attention.output, layer.output):
            block.dropout = Bottleneck(block.dense.out_features, width, block.dropout)


def add_prefixes(layers: Iterable[Any], length: int) -> None:
    """Give the attention of each encoder layer a prefix, in place."""
    for layer in layers:
        layer.attention.self = PrefixedAttention(layer.attention.self, length)


def describe_added(model: nn.Module) -> dict[str, Any] | None:
    """Describe in JSON what was added to a model; None where nothing was."""
    for part in model.modules():
        if isinstance(part, Bottleneck):
            return {"kind": "adapters", "width": part.width}
        if isinstance(part, PrefixedAttention):
            return {"kind": "prefix", "length": part.length}
    return None


def rebuild_added(layers: Iterable[nn.Module], description: Mapping[str, Any]) -> None:
    """Add what `describe_added` found, in place; weights are to be loaded over.

    Raises:
        UserError: if this version does not know the kind.
    """
    if description["kind"] == "adapters":
        add_bottlenecks(layers, description["width"])
    elif description["kind"] == "prefix":
        add_prefixes(layers, description["length"])
    else:
        raise UserError(f"headroom.json: added parts are {description['kind']}, this version reads adapters and prefix")


def _seen(mask: Tensor) -> float:
    """What a mask, bool or added to scores, says of a token that every other one sees."""
    return 1.0 if mask.dtype == torch.bool else 0.0

"""A classifier of the BERT family as the few operations that it needs, for export.

transformers computes for every case it knows; on short texts the runtimes spend a good part of their time on that.
This module holds the same weights and gives the same logits with less work:

- one additive mask for the whole model, without guards for texts that are nothing but padding;
- positions and the token type (0, texts come alone) in one table, and the scale of attention in the query's weights;
- the last layer only for the first token: the head reads no other, so only its keys and values need all of them.
  Of a model of few layers that is a large share of the work.
- an attention without heads, or a feed-forward part without neurons, is its bias alone;
- adapters and prefixes are computed as they are.

Query, key and value stay three products: merged into one they were no faster on ONNX Runtime and OpenVINO, as the
result has to be split again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.added import Bottleneck, PrefixedAttention, with_prefix
from stages.core.quantized import QuantizedLinear
from stages.core.structure import NoAttention, SlicedOutput, encoder_layers, head_size, is_compressible

_MASKED = 1e4
"""Taken from the score of padding: its share becomes zero, and half precision can hold the number."""
_LAYER_PARTS = {"attention", "intermediate", "output"}


def fits(model: nn.Module) -> bool:
    """Tell whether `LeanClassifier` knows all parts of the model: none that was put in the place of transformers'.

    Linear layers and tables of words may be of any kind; they are taken as they are. So may layers that lost their
    attention, sliced ones, and those with adapters or prefixes.
    """
    parts: Any = model
    if not (is_compressible(model) and type(model).__name__.endswith("ForSequenceClassification")):
        return False
    body = getattr(model, parts.base_model_prefix)
    layers: list[Any] = list(encoder_layers(model))
    known = [model, body, body.embeddings]
    for layer in layers:
        known += [layer, layer.intermediate]
        own = (layer.attention.self, layer.attention.output, layer.output)
        known += [part for part in own if not isinstance(part, NoAttention | SlicedOutput | PrefixedAttention)]
    return (
        not parts.config.is_decoder
        and bool(layers)
        and all({name for name, _ in layer.named_children()} == _LAYER_PARTS for layer in layers)
        and all(type(part).__module__.startswith("transformers.") for part in known)
    )


class LeanClassifier(nn.Module):
    """Logits of a classifier that `fits`; shares its weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        parts: Any = model
        body = getattr(parts, parts.base_model_prefix)
        layers = list(encoder_layers(model))
        self.embeddings = _Embeddings(body.embeddings)
        self.project = getattr(body, "embeddings_project", nn.Identity())  # ELECTRA
        self.layers = nn.ModuleList(_Layer(layer, first_only=layer is layers[-1]) for layer in layers)
        pooler = getattr(body, "pooler", None)  # BERT; others pool in the classifier
        # On [batch, 1, hidden] the product stays a MatMul; ONNX Runtime fuses no int8 weights into a Gemm.
        self.pooler = nn.Sequential(pooler.dense, pooler.activation, nn.Flatten(1)) if pooler else nn.Identity()
        self.classifier = parts.classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [batch, classes] of int64 ids and mask [batch, length]."""
        hidden = self.project(self.embeddings(input_ids))
        mask = ((attention_mask.to(hidden.dtype) - 1.0) * _MASKED)[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        # Heads read the first token of [batch, length, hidden], the only one left.
        logits: Tensor = self.classifier(self.pooler(hidden))
        return logits


class _Embeddings(nn.Module):
    """Embed words and positions, [batch, length, features]."""

    token_type: Tensor

    def __init__(self, embeddings: Any):
        super().__init__()
        self.words, self.norm = embeddings.word_embeddings, embeddings.LayerNorm
        self.table = embeddings.position_embeddings
        token_type = embeddings.token_type_embeddings(torch.zeros(1, dtype=torch.int64))
        self.in_float = type(self.table) is nn.Embedding
        if self.in_float:
            both = self.table.weight.detach() + token_type.detach()
            self.table = nn.Embedding.from_pretrained(both)  # type: ignore[no-untyped-call]
        self.register_buffer("token_type", token_type.detach())
        # RoBERTa's kin count positions over the tokens that are no padding.
        self.positions = getattr(embeddings, "create_position_ids_from_input_ids", None)
        self.padding = getattr(embeddings, "padding_idx", None)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.positions is not None:
            positions = self.table(self.positions(input_ids, self.padding))
        elif self.in_float:
            positions = self.table.weight[: input_ids.shape[1]]
        else:
            positions = self.table(torch.arange(input_ids.shape[1]))
        if not self.in_float:
            positions = positions + self.token_type
        embedded: Tensor = self.norm(self.words(input_ids) + positions)
        return embedded


class _Layer(nn.Module):
    """An encoder layer, [batch, length, hidden]; with `first_only`, its output for the first token, [batch, 1, hidden].

    Args:
        layer: of transformers.
        first_only: whether only the first token's output is wanted.
    """

    def __init__(self, layer: Any, first_only: bool):
        super().__init__()
        self.first_only = first_only
        self.attention = _Attention(layer)
        self.attention_norm = layer.attention.output.LayerNorm
        self.attention_skip, self.skip = _skip(layer.attention.output), _skip(layer.output)
        self.attention_adapter, self.adapter = _adapter(layer.attention.output), _adapter(layer.output)
        self.up, self.activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.down, self.norm = layer.output.dense, layer.output.LayerNorm

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        asking = hidden[:, :1] if self.first_only else hidden
        attention = self.attention_adapter(self.attention(asking, hidden, mask))
        attended = self.attention_norm(attention + self.attention_skip(asking))
        change = self.down(self.activation(self.up(attended))) if self.down.in_features else self.down.bias
        output: Tensor = self.norm(self.adapter(change) + self.skip(attended))
        return output


def _skip(block: Any) -> nn.Module:
    """What the residual connection does to a block's input: nothing, unless hidden states are sliced."""
    return block.skip if isinstance(block, SlicedOutput) else nn.Identity()


def _adapter(block: Any) -> nn.Module:
    """The adapter at the end of a block, where there is one."""
    return block.dropout if isinstance(block.dropout, Bottleneck) else nn.Identity()


class _Attention(nn.Module):
    """Attention of the tokens asking, [batch, asking, hidden], to all tokens, [batch, length, hidden]."""

    def __init__(self, layer: Any):
        super().__init__()
        attention = layer.attention.self
        self.output = layer.attention.output.dense
        self.size = head_size(layer)
        self.heads = self.output.in_features // self.size
        if not self.heads:
            return
        self.query, self.query_scale = scale_into(attention.query, self.size**-0.5)
        self.key, self.value = attention.key, attention.value
        self.prefixed = isinstance(attention, PrefixedAttention)
        if self.prefixed:
            self.prefix_keys, self.prefix_values = attention.prefix_keys, attention.prefix_values

    def forward(self, asking: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        if not self.heads:
            bias: Tensor = self.output.bias
            return bias
        shape = (self.heads, self.size)
        query = self.query(asking).unflatten(-1, shape).transpose(1, 2)
        key = self.key(hidden).unflatten(-1, shape).permute(0, 2, 3, 1)
        value = self.value(hidden).unflatten(-1, shape).transpose(1, 2)
        if self.prefixed:
            key = with_prefix(self.prefix_keys, key.transpose(2, 3)).transpose(2, 3)
            value = with_prefix(self.prefix_values, value)
            mask = nn.functional.pad(mask, (self.prefix_keys.shape[1], 0))
        scores = query @ key if self.query_scale == 1.0 else (query * self.query_scale) @ key
        context = torch.softmax(scores + mask, dim=-1) @ value
        attended: Tensor = self.output(context.transpose(1, 2).flatten(2))
        return attended


def scale_into(linear: nn.Module, factor: float) -> tuple[nn.Module, float]:
    """Multiply a linear layer's output by a factor, in its weights where its kind is known.

    Returns:
        a layer and the factor that remains, 1 where the weights took it.
    """
    scaled: Any = copy.deepcopy(linear)
    if type(linear) is nn.Linear:
        scaled.weight.data *= factor
    elif type(linear) is QuantizedLinear:
        scaled.weight_scale = scaled.weight_scale * factor
    else:
        return linear, factor
    if scaled.bias is not None:
        scaled.bias.data *= factor
    return scaled, 1.0

"""The parts of an encoder that compression moves, found by name.

BERT, RoBERTa, ELECTRA and their kin name their parts alike; layers may have different widths after pruning, which
the Hugging Face configuration cannot say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.core.added import PrefixedAttention
from stages.core.errors import UserError

_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models that a model is made of, not those within them."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in outermost(child)]


@dataclass(frozen=True)
class LayerWidth:
    """Width of one encoder layer."""

    heads: int
    """0: no attention."""
    neurons: int
    """0: no feed-forward."""


class ConstantOutput(nn.Module):
    """Output projection of a block that lost all its parts: its bias is what remains of the block."""

    def __init__(self, out_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = 0, out_features
        self.bias = nn.Parameter(torch.zeros(out_features) if bias is None else bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the bias [out features], which the residual connection broadcasts over all tokens."""
        return self.bias


class EmptyInput(nn.Module):
    """Input projection of a block that lost all its parts."""

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Turn [..., in features] into [..., 0]."""
        return inputs[..., :0]


class NoAttention(nn.Module):
    """Self-attention without heads."""

    def __init__(self, head_size: int):
        super().__init__()
        self.attention_head_size, self.num_attention_heads, self.all_head_size = head_size, 0, 0

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Turn [batch, length, hidden] into [batch, length, 0]; there are no attention weights."""
        return hidden_states[..., :0], None


class SlicedOutput(nn.Module):
    """The end of a block whose input and output are told in different bases: its residual is a matrix product."""

    def __init__(self, dense: nn.Module, skip: nn.Module, norm: nn.Module, dropout: nn.Module):
        super().__init__()
        self.dense, self.skip, self.LayerNorm, self.dropout = dense, skip, norm, dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Add features [batch, length, features] to the block's input [batch, length, hidden], and normalize."""
        output: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + self.skip(input_tensor))
        return output


def is_compressible(model: nn.Module) -> bool:
    """Tell whether the model's family is one whose parts are known here."""
    config: Any = model.config
    return config.model_type in _FAMILIES


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the model's encoder layers.

    Raises:
        UserError: if the family names its parts differently.
    """
    config: Any = model.config
    if not is_compressible(model):
        raise UserError(
            f"model_type {config.model_type}: compression knows {', '.join(_FAMILIES)}; take a checkpoint of these"
        )
    layers: Any = _body(model).encoder.layer
    return layers  # type: ignore[no-any-return]


def quantizable_linears(model: nn.Module) -> list[str]:
    """Names of the float linear layers inside the encoder and its pooler, which int8 may compute.

    The output layer is not among them: it is tiny, and every error there is an error of the answer.
    """
    inside = {id(part) for layer in encoder_layers(model) for part in layer.modules()}
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and (id(part) in inside or "pooler" in name)
    ]


def attention_linears(layer: nn.Module) -> list[nn.Linear]:
    """Query, key and value of a layer, each [heads x head size, hidden]; none where there are no heads."""
    if isinstance(layer.get_submodule("attention.self"), NoAttention):
        return []
    return [_linear(layer, f"attention.self.{name}") for name in ("query", "key", "value")]


def attention_output(layer: nn.Module) -> nn.Linear:
    """Projection after attention, [hidden, heads x head size]."""
    return _linear(layer, "attention.output.dense")


def neuron_input(layer: nn.Module) -> nn.Linear:
    """First feed-forward projection, [neurons, hidden]."""
    return _linear(layer, "intermediate.dense")


def neuron_output(layer: nn.Module) -> nn.Linear:
    """Second feed-forward projection, [hidden, neurons]."""
    return _linear(layer, "output.dense")


def head_size(layer: nn.Module) -> int:
    """Features per attention head."""
    attention: Any = layer.get_submodule("attention.self")
    return int(attention.attention_head_size)


def hidden_width(model: nn.Module) -> int:
    """Features of the hidden states; fewer than the configuration says after slicing."""
    return int(neuron_output(encoder_layers(model)[0]).out_features)


def is_sliced(model: nn.Module) -> bool:
    """Tell whether the hidden states were sliced."""
    return is_compressible(model) and any(isinstance(part, SlicedOutput) for part in model.modules())


def layer_widths(model: nn.Module) -> list[LayerWidth]:
    """Read the widths of every encoder layer."""
    return [
        LayerWidth(attention_output(layer).in_features // head_size(layer), neuron_output(layer).in_features)
        for layer in encoder_layers(model)
    ]


def keep_parts(layer: nn.Module, heads: Tensor, neurons: Tensor) -> None:
    """Remove all but the given attention heads and feed-forward neurons from a layer, in place.

    A block without parts leaves the computation; its output bias, the residual and the norm stay.

    Args:
        layer: an encoder layer.
        heads: indices to keep, ascending.
        neurons: indices to keep, ascending.
    """
    _keep_heads(layer, heads)
    _keep_neurons(layer, neurons)


def set_widths(model: nn.Module, widths: Sequence[LayerWidth]) -> None:
    """Give every layer the shape of `widths`, in place; the weights kept are arbitrary, to be loaded over."""
    layers = encoder_layers(model)
    if len(layers) != len(widths):
        raise UserError(f"headroom.json: has widths for {len(widths)} layers where config.json says {len(layers)}")
    for layer, width in zip(layers, widths, strict=True):
        keep_parts(layer, torch.arange(width.heads), torch.arange(width.neurons))


def keep_layers(model: nn.Module, kept: Sequence[int]) -> None:
    """Remove all but the given encoder layers, in place.

    Raises:
        UserError: if there are fewer layers, or each speaks a basis of its own.
    """
    layers = encoder_layers(model)
    if is_sliced(model):
        raise UserError("the model's hidden states are sliced, so no layer fits another's place; keep all layers")
    if max(kept) >= len(layers):
        raise UserError(f"distill.student.layers: the teacher has layers 0 to {len(layers) - 1}, got {list(kept)}")
    _body(model).encoder.layer = nn.ModuleList([layers[index] for index in kept])
    config: Any = model.config
    config.num_hidden_layers = len(kept)


def widths_to_json(widths: Sequence[LayerWidth]) -> list[dict[str, int]]:
    """Describe widths in JSON."""
    return [asdict(width) for width in widths]


def widths_from_json(entries: Sequence[dict[str, int]]) -> list[LayerWidth]:
    """Read what `widths_to_json` wrote."""
    return [LayerWidth(**entry) for entry in entries]


def _body(model: nn.Module) -> Any:
    """Return the encoder under a head, or the model itself where there is no head."""
    return getattr(model, str(model.base_model_prefix), model)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    part = layer.get_submodule(name)
    if not hasattr(part, "in_features"):
        raise TypeError(f"{name} is not a linear layer")
    return part  # type: ignore[return-value]


def _keep_heads(layer: nn.Module, heads: Tensor) -> None:
    size, output = head_size(layer), attention_output(layer)
    if len(heads) == 0:
        _put(layer, "attention.self", NoAttention(size))
        _put(layer, "attention.output.dense", ConstantOutput(output.out_features, output.bias))
        return
    features = (heads[:, None] * size + torch.arange(size)).flatten()
    for name in ("query", "key", "value"):
        _replace(layer, f"attention.self.{name}", features, dimension=0)
    _replace(layer, "attention.output.dense", features, dimension=1)
    attention = layer.get_submodule("attention.self")
    if isinstance(attention, PrefixedAttention):
        attention.keep_heads(heads)
    _tell_attention(layer, len(heads))


def _keep_neurons(layer: nn.Module, neurons: Tensor) -> None:
    output = neuron_output(layer)
    if len(neurons) == 0:
        _put(layer, "intermediate.dense", EmptyInput(neuron_input(layer).in_features))
        _put(layer, "output.dense", ConstantOutput(output.out_features, output.bias))
        return
    _replace(layer, "intermediate.dense", neurons, dimension=0)
    _replace(layer, "output.dense", neurons, dimension=1)


def _put(layer: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, part)


def _replace(layer: nn.Module, name: str, kept: Tensor, dimension: int) -> None:
    old = _linear(layer, name)
    weight = old.weight.detach().index_select(dimension, kept).clone()
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None)
    new.weight = nn.Parameter(weight)
    if old.bias is not None:
        bias = old.bias.detach()
        new.bias = nn.Parameter((bias.index_select(0, kept) if dimension == 0 else bias).clone())
    _put(layer, name, new)


def _tell_attention(layer: nn.Module, heads: int) -> None:
    attention: Any = layer.get_submodule("attention.self")
    attention.num_attention_heads = heads
    attention.all_head_size = heads * attention.attention_head_size

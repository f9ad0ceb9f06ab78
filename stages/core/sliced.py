"""Where the hidden states of an encoder are written and read, and the shape of a model in which they are narrower.

Post-norm encoders write hidden states at the embeddings and at the end of every block, each time through a layer norm.
`stages/prune/slicing.py` tells each of these in fewer numbers, in a basis of its own, so the residual connection of a
block becomes a matrix from one basis to the next (`SlicedOutput`). The norms stay layer norms, the attention and
feed-forward widths stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stages.core.added import Bottleneck
from stages.core.errors import UserError
from stages.core.quantized import quantized_parts, replace_module
from stages.core.structure import (
    ConstantOutput,
    EmptyInput,
    NoAttention,
    SlicedOutput,
    encoder_layers,
    is_compressible,
    is_sliced,
)

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


@dataclass(frozen=True)
class Site:
    """A place where hidden states are normalized, by names of modules."""

    norm: str
    block: str | None
    """What ends in the norm: projection, residual, norm. None for the embeddings."""
    readers: Sequence[str]
    """Linear layers that read the states."""


def check_sliceable(model: nn.Module) -> None:
    """Check that a model's hidden states can be sliced.

    Raises:
        UserError: if its family, its head or an earlier compression does not allow it.
    """
    config: Any = model.config
    trouble = None
    if not is_compressible(model) or not type(model).__name__.endswith("ForSequenceClassification"):
        trouble = f"{type(model).__name__} is no classifier of the BERT family"
    elif config.is_decoder:
        trouble = f"{type(model).__name__} is a decoder"
    elif hasattr(_body(model), "embeddings_project"):
        trouble = f"{config.model_type} projects its embeddings without a norm"
    elif is_sliced(model):
        trouble = "the checkpoint is sliced already"
    elif quantized_parts(model):
        trouble = "the checkpoint is quantized already"
    elif any(isinstance(part, Bottleneck) for part in model.modules()):
        trouble = "the checkpoint has adapters (finetune.efficient), which read whole hidden states"
    if trouble:
        raise UserError(f"prune.hidden_slicing: {trouble}; set it to null")


def find_sites(model: nn.Module) -> list[Site]:
    """Find the places in the order in which a text passes them; of each layer, after attention and at its end."""
    prefix = str(model.base_model_prefix)
    pooler = getattr(_body(model), "pooler", None)
    head = [f"{prefix}.pooler.dense" if pooler is not None else "classifier.dense"]
    layers = encoder_layers(model)
    names = [f"{prefix}.encoder.layer.{index}" for index in range(len(layers))]
    reading = [*(_attention_inputs(layer, name) for layer, name in zip(layers, names, strict=True)), head]
    sites = [Site(f"{prefix}.embeddings.LayerNorm", None, reading[0])]
    for name, following in zip(names, reading[1:], strict=True):
        first, second = f"{name}.attention.output", f"{name}.output"
        sites.append(Site(f"{first}.LayerNorm", first, [f"{name}.intermediate.dense"]))
        sites.append(Site(f"{second}.LayerNorm", second, following))
    return sites


def table_names(model: nn.Module) -> list[str]:
    """Names of the embeddings whose sum is the first thing normalized."""
    return [f"{model.base_model_prefix}.embeddings.{name}" for name in TABLES]


def set_hidden_width(model: nn.Module, width: int) -> None:
    """Give every part that writes or reads hidden states the shape it has after slicing, in place.

    The weights are arbitrary, to be loaded over.

    Args:
        model: not sliced yet.
        width: of the hidden states.
    """
    for name in table_names(model):
        table: Any = model.get_submodule(name)
        replace_module(model, name, nn.Embedding(table.num_embeddings, width, padding_idx=table.padding_idx))
    for site in find_sites(model):
        norm: Any = model.get_submodule(site.norm)
        narrow = nn.LayerNorm(width, eps=norm.eps)
        if site.block is None:
            replace_module(model, site.norm, narrow)
        else:
            block: Any = model.get_submodule(site.block)
            skip = nn.Linear(width, width, bias=False)
            replace_module(model, site.block, SlicedOutput(_writer(block.dense, width), skip, narrow, block.dropout))
        for name in site.readers:
            replace_module(model, name, _reader(model.get_submodule(name), width))


def _attention_inputs(layer: nn.Module, name: str) -> list[str]:
    if isinstance(layer.get_submodule("attention.self"), NoAttention):
        return []
    return [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]


def _writer(dense: Any, width: int) -> nn.Module:
    if isinstance(dense, ConstantOutput):
        return ConstantOutput(width)
    return nn.Linear(dense.in_features, width)


def _reader(linear: Any, width: int) -> nn.Module:
    if isinstance(linear, EmptyInput):
        return EmptyInput(width)
    return nn.Linear(width, linear.out_features)


def _body(model: nn.Module) -> Any:
    return getattr(model, str(model.base_model_prefix), model)

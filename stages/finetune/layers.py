"""A model's layers by depth, whatever its family: slower learning below, fresh weights on top, dropout everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from stages.core.errors import UserError

# BERT's encoder.layer.0, Llama's model.layers.0, GPT-2's h.0, T5's block.0; ALBERT's groups share weights among layers.
_LAYER = re.compile(r"^(?P<stack>.*?\b(?:layers?|h|block|albert_layer_groups))\.(?P<index>\d+)\.")
_EMBEDDINGS = re.compile(r"emb|\bwte\b|\bwpe\b|\bshared\b")
_POOLER = "pooler"


def layer_stacks(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each stack of them, by its name, first to last: two for an encoder with a decoder."""
    stacks: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            stacks[found["stack"]] = max(stacks.get(found["stack"], 0), int(found["index"]) + 1)
    return stacks


def learning_rate_shares(names: Iterable[str], decay: float) -> dict[str, float]:
    """Share of the learning rate of each parameter: 1 for the head, `decay` less for each layer further down.

    Embeddings lie below the first layer, and a decoder above its encoder. Layers that share their weights count as one.

    Args:
        names: of all parameters.
        decay: from layer to layer.
    """
    names = list(names)
    below, bottoms = 0, {}
    for stack, layers in layer_stacks(names).items():
        bottoms[stack], below = below, below + layers
    return {name: decay ** (below + 1 - _depth(name, bottoms, below + 1)) for name in names}


def _depth(name: str, bottoms: dict[str, int], top: int) -> int:
    """0 for embeddings, 1 for the first layer, and so on; `top` for all that comes after the layers."""
    if found := _LAYER.match(name):
        return bottoms[found["stack"]] + int(found["index"]) + 1
    return 0 if _EMBEDDINGS.search(name) else top


def reinitialize(model: Any, count: int) -> None:
    """Give the top layers, and the pooler, new weights from the model's own initialization (2006.05987), in place.

    What pretraining taught them is far from most tasks; chance comes from torch's generator.

    Args:
        model: of transformers.
        count: of layers, from the top; 0 changes nothing.

    Raises:
        UserError: if there are not more layers than that.
    """
    if count == 0:
        return
    stack, layers = list(layer_stacks(name for name, _ in model.named_parameters()).items())[-1]
    if count >= layers:
        raise UserError(
            f"finetune.reinitialized_layers: {count}, the checkpoint has {layers} layers with weights of their own; "
            f"take at most {layers - 1}"
        )
    renewed = [f"{stack}.{index}" for index in range(layers - count, layers)]
    renewed += [name for name, _ in model.named_modules() if name.rpartition(".")[2] == _POOLER]
    for name in renewed:
        for part in model.get_submodule(name).modules():
            _forget(part)
            model._init_weights(part)


def _forget(part: nn.Module) -> None:
    """Take the mark off weights that transformers loaded; marked ones are not initialized."""
    for parameter in part.parameters(recurse=False):
        if hasattr(parameter, "_is_hf_initialized"):
            del parameter._is_hf_initialized


def set_dropout(model: nn.Module, chance: float | None) -> None:
    """Set the chance of dropout everywhere, in place; None leaves the checkpoint's own.

    The model's configuration keeps what it said, so that the next stage trains as the checkpoint was meant to be.

    Raises:
        UserError: if the model has no dropout.
    """
    if chance is None:
        return
    found = 0
    for part in model.modules():
        # Some families keep the chance in a number beside their functional dropout.
        places = (
            ["p"] if isinstance(part, nn.Dropout) else [n for n, value in vars(part).items() if _is_chance(n, value)]
        )
        for name in places:
            setattr(part, name, chance)
        found += len(places)
    if not found:
        raise UserError("finetune.dropout: the checkpoint's architecture has no dropout; write null")


def _is_chance(name: str, value: object) -> bool:
    return "dropout" in name and isinstance(value, float)

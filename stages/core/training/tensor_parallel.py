"""Which matrices of a model are cut over the processes of `training.parallel.tensor` (Megatron-LM, 1909.08053).

Query, key, value and the first feed-forward projection are cut by their outputs: every process computes some heads and
some neurons. The projections after them are cut by their inputs, and one sum over the processes, for each of the two
blocks of a layer, makes the hidden states whole again.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from stages.core.errors import UserError
from stages.core.structure import encoder_layers, is_compressible, layer_widths

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_ENCODER_PLAN = {
    "attention.self.query": "colwise",
    "attention.self.key": "colwise",
    "attention.self.value": "colwise",
    "attention.output.dense": "rowwise",
    "intermediate.dense": "colwise",
    "output.dense": "rowwise",
}


def tensor_plan(model: nn.Module, processes: int) -> dict[str, ParallelStyle]:
    """Say how each linear layer is cut, by its name in the model.

    The encoders that compression knows have a plan here; of other families that of transformers is taken, and what it
    cuts in other ways than by outputs or inputs stays whole.

    Raises:
        UserError: if the family has no plan, or its heads or neurons cannot be shared evenly.
    """
    _check_widths(model, processes)
    plan = _encoder_plan(model) if is_compressible(model) else _own_plan(model)
    if not plan:
        config: Any = model.config
        raise UserError(
            f"training.parallel.tensor: no way is known to cut a {config.model_type}; set it to 1 and use shards"
        )
    return {name: _STYLES[style]() for name, style in plan.items()}


def _encoder_plan(model: nn.Module) -> dict[str, str]:
    prefixes = {id(part): name for name, part in model.named_modules()}
    return {
        f"{prefixes[id(layer)]}.{name}": style
        for layer in encoder_layers(model)
        for name, style in _ENCODER_PLAN.items()
        if isinstance(layer.get_submodule(name), nn.Linear)
    }


def _own_plan(model: Any) -> dict[str, str]:
    wanted = {pattern: style for pattern, style in (model.tp_plan or {}).items() if style in _STYLES}
    return {
        name: style
        for name, part in model.named_modules()
        for pattern, style in wanted.items()
        if isinstance(part, nn.Linear) and fnmatchcase(name, pattern)
    }


def _check_widths(model: Any, processes: int) -> None:
    """A head is never cut in two, and every process has as many as the others."""
    config = model.config
    if is_compressible(model):
        found = {f"layer {index}": (width.heads, width.neurons) for index, width in enumerate(layer_widths(model))}
    else:
        heads = config.num_attention_heads
        found = {"a layer": (heads, getattr(config, "num_key_value_heads", None) or heads)}
    for where, counts in found.items():
        if any(count % processes for count in counts):
            raise UserError(
                f"training.parallel.tensor: {processes} processes cannot share the {counts[0]} heads and "
                f"{counts[1]} {'neurons' if is_compressible(model) else 'key heads'} of {where} evenly; "
                "take a divisor of both"
            )

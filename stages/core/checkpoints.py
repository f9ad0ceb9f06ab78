"""Checkpoints: the Hugging Face folder, plus `headroom.json` for what that form cannot say.

`headroom.json` holds the width of every layer after pruning and of the hidden states after slicing, what adapters or
prefixes were added, how parts are quantized, and the lineage. One call loads any of them back with the same logits.
Weights are safetensors; pickles are never read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from stages.core.added import describe_added, rebuild_added
from stages.core.artifacts import digest, read_json, write_json
from stages.core.errors import UserError
from stages.core.quantized import describe_quantized, quantized_parts, rebuild_quantized
from stages.core.sliced import set_hidden_width
from stages.core.structure import (
    encoder_layers,
    hidden_width,
    is_compressible,
    is_sliced,
    layer_widths,
    set_widths,
    widths_from_json,
    widths_to_json,
)

HEADROOM_FILE = "headroom.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()


def save_model(
    model: nn.Module,
    folder: Path,
    tokenizer: Path,
    lineage: list[dict[str, str]],
    leftovers: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with its tokenizer.

    Args:
        model: a transformers model, pruned or quantized or neither.
        folder: to write into.
        tokenizer: folder whose tokenizer files are copied.
        lineage: the stages that made the model, oldest first.
        leftovers: tensors that the model has no place for but that a later stage wants.
    """
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_weights({**(leftovers or {}), **_without_ties(model)}, folder)
    copy_tokenizer(tokenizer, folder)
    description = {
        "format": FORMAT,
        "widths": widths_to_json(layer_widths(model)) if is_compressible(model) else None,
        "added": describe_added(model),
        "sliced_to": hidden_width(model) if is_sliced(model) else None,
        "quantized": describe_quantized(model),
        "lineage": lineage,
    }
    write_json(folder / HEADROOM_FILE, description)


def load_model(folder: Path) -> nn.Module:
    """Load a checkpoint that a stage wrote, in float32 and evaluation mode.

    Raises:
        UserError: if the weights do not fit the description.
    """
    description = read_json(folder / HEADROOM_FILE)
    if description["format"] != FORMAT:
        raise UserError(f"{folder / HEADROOM_FILE}: format {description['format']}, this version reads {FORMAT}")
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    model: nn.Module = architecture(config)
    # Before widths, as pruning cuts prefixes too. Checkpoints from before there were added parts do not name them.
    if description.get("added") is not None:
        rebuild_added(encoder_layers(model), description["added"])
    if description["widths"] is not None:
        set_widths(model, widths_from_json(description["widths"]))
    # Checkpoints from before there was slicing do not name it.
    if description.get("sliced_to") is not None:
        set_hidden_width(model, description["sliced_to"])
    rebuild_quantized(model, description["quantized"])
    _load_weights(model, folder)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer in its fast form."""
    return transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)


def extend_lineage(parent: Path, stage: str) -> list[dict[str, str]]:
    """Stages that made the parent, and this one with the parent's digest; a parent from outside has none."""
    path = parent / HEADROOM_FILE
    known = list(read_json(path)["lineage"]) if path.exists() else []
    return [*known, {"stage": stage, "parent": digest(parent)}]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and nothing else."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    """The state without second names of the same tensor, which loading ties again."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def _with_ties(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as `_without_ties` left it, with every name that a tensor has in the model."""
    written = {tensor.data_ptr(): state[name] for name, tensor in model.state_dict().items() if name in state}
    second = {
        name: written[tensor.data_ptr()]
        for name, tensor in model.state_dict().items()
        if name not in state and tensor.numel() and tensor.data_ptr() in written
    }
    return {**state, **second}


def _write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in sorted(state.items())}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def count_parameters(model: nn.Module) -> int:
    """Count weights, quantized ones included; scales and tables of positions do not count."""
    quantized = sum(part.count_parameters() for part in quantized_parts(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) + quantized


def _load_weights(model: nn.Module, folder: Path) -> None:
    try:
        state = _with_ties(model, safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: cannot be read ({error}); run `dvc checkout` to restore it"
        ) from None
    try:
        model.load_state_dict(state, strict=True, assign=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the weights do not fit config.json and {HEADROOM_FILE}: {reason}") from None


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a model without gradients and return its logits in float32."""
    with torch.inference_mode():
        output: Tensor = model(**batch).logits
    return output.float()

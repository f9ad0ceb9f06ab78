"""The saved state of a training run: everything that decides its next step.

Written beside the last one, flushed, renamed, with checksums, so that a kill at any instant leaves a whole state.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from stages.core.artifacts import publish, read_json, verify, write_json, write_manifest
from stages.core.training.recipe import Position


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    position: Position,
) -> None:
    """Write the state of a run in one step."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {"generator": torch.get_rng_state()}
    tensors |= {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in entry.items()}
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, draft / "state.safetensors")
    write_json(draft / "position.json", vars(position))
    write_manifest(draft)
    publish(draft, folder)


def restore_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]
) -> tuple[Position, dict[str, Tensor]] | None:
    """Bring a model, its optimizer, the average of its weights and the generator back to a saved state.

    Returns:
        where the run stood and the best weights so far; None where nothing was saved.
    """
    if not folder.exists():
        return None
    verify(folder)
    tensors = safetensors.torch.load_file(folder / "state.safetensors")
    model.load_state_dict(_below("model/", tensors))
    for name, tensor in _below("average/", tensors).items():
        average[name].copy_(tensor)
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer/", tensors).items():
        index, _, key = name.partition("/")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    torch.set_rng_state(tensors["generator"])
    return Position(**read_json(folder / "position.json")), _below("best/", tensors)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

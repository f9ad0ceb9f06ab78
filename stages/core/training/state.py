"""The saved states of a training run: everything that decides its next step.

A state is copied between two steps and written in another thread: beside the ones before, flushed, with checksums, and
renamed at last, so that a kill at any instant leaves a whole state. The last few are kept; one that was damaged is
said and left out, and the one before counts. The learning rate and the order of the data are not saved: both are
computed from the position.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from stages.core.artifacts import publish, read_json, tells_full_disk, verify, write_json, write_manifest
from stages.core.errors import UserError
from stages.core.training.recipe import Faults, Position

_TENSORS, _VALUES = "state.safetensors", "state.json"


class Stateful(Protocol):
    """A part of a training run that is saved: a model, an optimizer, the generators."""

    def state_dict(self) -> Any:
        """Everything that decides what the part does next: tensors and plain values, nested at will."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go back to where it stood."""


@dataclass(frozen=True)
class Saved:
    """What a saved state says beside the states of the parts, which it has put back."""

    position: Position
    best: dict[str, Tensor]
    """Weights of the best round so far."""


class SavedStates:
    """The last saved states of one training run, in a folder."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]):
        """Args are the folder, how many states stay, and how to tell people."""
        self._folder, self._keep, self._say = folder, keep, say
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._writing: Future[None] | None = None
        self._disk_was_full = False

    def save(self, position: Position, best: Mapping[str, Tensor], parts: Mapping[str, Stateful]) -> None:
        """Copy the state now and write it in another thread; a save that is still being written is waited for.

        A full disk is said once and is no error: the states saved before stand, and the next save tries again.
        """
        self.wait()
        copies, states = _Copies(), {name: part.state_dict() for name, part in parts.items()}
        values = copies.take_apart({"position": asdict(position), "best": best, **states})
        self._writing = self._writer.submit(self._write, values, copies.tensors)

    def wait(self) -> None:
        """Wait until what was saved is safe on disk.

        Raises:
            OSError: if it could not be written, for any reason but a full disk.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(
        self, parts: Mapping[str, Stateful], usable: Callable[[Position], bool] = lambda position: True
    ) -> Saved | None:
        """Bring the parts back to the newest whole state whose position is usable.

        Returns:
            where the run stood; None where no such state was saved.
        """
        self.wait()
        for folder in reversed(self._folders()):
            state = self._read(folder)
            if state is None:
                continue
            position = Position(**{**state["position"], "faults": Faults(**state["position"]["faults"])})
            if usable(position):
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                return Saved(position, state["best"])
        return None

    def _read(self, folder: Path) -> dict[str, Any] | None:
        """Read a state; one that is damaged is said, removed and None, so that the one before counts."""
        try:
            verify(folder)
        except UserError as error:
            reason = str(error).partition(";")[0]
            self._say(f"a saved state is damaged and left out, the one before it counts ({reason})")
            shutil.rmtree(folder, ignore_errors=True)  # another process of the run may have been faster
            return None
        state: dict[str, Any] = _put_together(
            read_json(folder / _VALUES), safetensors.torch.load_file(folder / _TENSORS)
        )
        return state

    def _write(self, values: Any, tensors: dict[str, Tensor]) -> None:
        draft = self._folder / ".draft"
        try:
            _write_files(draft, values, tensors)
            write_manifest(draft)
            publish(draft, self._next_folder())
        except Exception as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not tells_full_disk(error):
                raise
            self._say_full_disk()
        else:
            self._disk_was_full = False
            for folder in self._folders()[: -self._keep]:
                shutil.rmtree(folder)

    def _say_full_disk(self) -> None:
        if not self._disk_was_full:
            standing = self._folders()[-1:]
            what = f"the one in {standing[0]} stands" if standing else "none was saved before"
            self._say(f"the disk is full, so the state could not be saved; {what}, training goes on and tries again")
        self._disk_was_full = True

    def _folders(self) -> list[Path]:
        """Saved states, the newest last."""
        return sorted(path for path in self._folder.glob("state-*") if path.is_dir())

    def _next_folder(self) -> Path:
        folders = self._folders()
        number = int(folders[-1].name.removeprefix("state-")) + 1 if folders else 1
        return self._folder / f"state-{number:08d}"


def _write_files(folder: Path, values: Any, tensors: dict[str, Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while it saved
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / _TENSORS)
    write_json(folder / _VALUES, values)


class _Copies:
    """Copies of the tensors of a state, by number; tensors that share their memory are copied once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def take_apart(self, value: Any) -> Any:
        """Turn nested dictionaries and lists into what JSON holds, with the numbers of the tensors in their place.

        Dictionaries become lists of pairs, since JSON knows no keys but strings and optimizers count their parameters;
        numbers that are not finite become text.
        """
        if isinstance(value, Tensor):
            return {"tensor": self._copy(value)}
        if isinstance(value, Mapping):
            return {"pairs": [[key, self.take_apart(inner)] for key, inner in value.items()]}
        if isinstance(value, list | tuple):
            return [self.take_apart(inner) for inner in value]
        return {"number": str(value)} if isinstance(value, float) and not math.isfinite(value) else value

    def _copy(self, tensor: Tensor) -> str:
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        name = self._names.setdefault(memory, str(len(self._names)))
        if name not in self.tensors:
            self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        return name


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `take_apart`; tuples have become lists."""
    if isinstance(value, list):
        return [_put_together(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "number" in value:
        return float(value["number"])
    return {key: _put_together(inner, tensors) for key, inner in value["pairs"]}

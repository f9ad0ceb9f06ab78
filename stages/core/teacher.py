"""What a teacher says of texts: asked once for each, kept on disk by teacher and text.

A text's answer never depends on which texts were asked with it: texts of one length go through the model in batches
of one shape, the last filled up. So a student trained on answers from the disk gets, bit for bit, the weights it
would get from fresh ones, however the disk came by them.

On disk, a folder stands for a teacher, its precision and what was recorded; each time new texts were asked it got one
more part, a unit with sums, published in one step. All of it together is held under a limit: the parts that were not
used for the longest go first, those in use stay.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stages.core.artifacts import ARTIFACTS, digest, publish, text_sha256, verify, write_manifest
from stages.core.checkpoints import load_model
from stages.core.errors import UserError
from stages.core.observe.progress import track
from stages.core.params import Precision
from stages.core.relations import recorded_projections
from stages.core.training.precision import autocast, resolve_precision

CACHE = ARTIFACTS / ".cache" / "teacher"
CACHE_BYTES = 4 * 2**30

_BATCH_SIZE = 32
_FILE = "outputs.safetensors"


@dataclass(frozen=True)
class Recorded:
    """What of the teacher is kept beside its logits; layers are counted from 0."""

    hidden: tuple[int, ...] = ()
    """Layers whose output is kept."""
    attention: tuple[int, ...] = ()
    """Layers whose queries and keys are kept."""
    relations: int | None = None
    """Layer whose queries, keys and values are kept."""

    @property
    def projections(self) -> list[int]:
        """Layers whose attention linears are listened to."""
        return sorted({*self.attention, *([] if self.relations is None else [self.relations])})


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of every text; per token, the texts' tokens lie end to end."""

    logits: Tensor
    """float32 [texts, classes]."""
    hidden: list[Tensor]
    """For each recorded layer the hidden states, bfloat16 [tokens, hidden]."""
    attention: list[Tensor]
    """For each recorded layer queries and keys, bfloat16 [tokens, 2, width]."""
    relations: Tensor | None
    """Queries, keys and values, bfloat16 [tokens, 3, width]."""
    starts: Tensor
    """Where each text's tokens begin, int64 [texts + 1]."""

    def tokens(self, texts: Tensor) -> Tensor:
        """Indices of the tokens of some texts, text by text, int64 [tokens of these texts]."""
        return _token_indices(self.starts, texts)


def teacher_outputs(
    teacher: Path, rows: Sequence[Sequence[int]], recorded: Recorded, precision: Precision
) -> TeacherOutputs:
    """Ask the teacher about every text that it was not asked about before.

    Args:
        teacher: checkpoint folder.
        rows: token ids of the texts.
        recorded: what is kept beside the logits.
        precision: in which the teacher computes.
    """
    folder = CACHE / text_sha256("\n".join([digest(teacher), repr(recorded), resolve_precision(precision)]))[:16]
    keys = [_key(row) for row in rows]
    places = _known(folder)
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in places}
    if missing:
        # Loading draws random numbers; whether the answers were on disk must not show in what is trained next.
        with torch.random.fork_rng(devices=[]), autocast(precision):
            part = _store(_ask(load_model(teacher), list(missing.values()), recorded), list(missing), folder)
        places |= {key: (part, position) for position, key in enumerate(missing)}
    wanted = [places[key] for key in keys]
    tensors, starts = _collect(wanted)
    _forget_unused({part for part, _ in wanted})
    return TeacherOutputs(
        tensors["logits"],
        [tensors[f"hidden/{layer}"] for layer in recorded.hidden],
        [tensors[f"attention/{layer}"] for layer in recorded.attention],
        tensors.get("relations"),
        starts,
    )


def average_logits(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits whose probabilities at the temperature are the mean of the teachers' (1503.02531, section 3).

    Probabilities are averaged, not logits: a teacher that is sure must not drown those that are not.

    Args:
        logits: of each teacher, [texts, classes].
        temperature: at which the student will be taught.
    """
    if len(logits) == 1:
        return logits[0]
    probabilities = torch.stack([torch.log_softmax(each / temperature, dim=-1) for each in logits])
    mean = probabilities.logsumexp(dim=0) - torch.tensor(float(len(logits))).log()
    return mean * temperature


def _key(row: Sequence[int]) -> bytes:
    return hashlib.sha256(repr(list(row)).encode()).digest()[:16]


def _known(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Where each known text's answer is: part and position in it. A damaged part is as good as none: it goes."""
    places: dict[bytes, tuple[Path, int]] = {}
    for part in sorted(path for path in folder.glob("*") if path.is_dir()):
        try:
            verify(part)
        except UserError:
            shutil.rmtree(part)
            continue
        places |= {key.tobytes(): (part, position) for position, key in enumerate(_tensor(part, "keys").numpy())}
    return places


def _ask(model: nn.Module, rows: Sequence[Sequence[int]], recorded: Recorded) -> dict[str, Tensor]:
    starts = _starts(torch.tensor([len(row) for row in rows]))
    kept: dict[str, Tensor] = {}
    for batch in track(_batches_of_one_shape(rows), "ask the teacher"):
        ids = torch.tensor([rows[i] for i in _filled(batch)])
        with torch.inference_mode(), recorded_projections(model, recorded.projections) as seen:
            output = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=bool(recorded.hidden)
            )
        texts = torch.tensor(batch)
        _put(kept, "logits", texts, output.logits[: len(batch)].float(), len(rows))
        tokens = _token_indices(starts, texts)
        for name, states in _answers(recorded, output, seen):
            _put(kept, name, tokens, states[: len(batch)].flatten(0, 1).to(torch.bfloat16), int(starts[-1]))
    return kept | {"starts": starts}


def _answers(recorded: Recorded, output: Any, seen: Mapping[int, list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What is recorded per token, each [texts, length, ...]."""
    for layer in recorded.hidden:
        yield f"hidden/{layer}", output.hidden_states[layer + 1]
    for layer in recorded.attention:
        yield f"attention/{layer}", torch.stack(seen[layer][:2], dim=2)
    if recorded.relations is not None:
        yield "relations", torch.stack(seen[recorded.relations], dim=2)


def _batches_of_one_shape(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of texts of one length each, at most `_BATCH_SIZE` together."""
    same: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        same[len(row)].append(index)
    return [
        indices[start : start + _BATCH_SIZE]
        for _, indices in sorted(same.items())
        for start in range(0, len(indices), _BATCH_SIZE)
    ]


def _filled(batch: list[int]) -> list[int]:
    """Fill a batch up with its first text: kernels, and so the last bits, are chosen by the shape of the batch."""
    return batch + batch[:1] * (_BATCH_SIZE - len(batch))


def _put(kept: dict[str, Tensor], name: str, indices: Tensor, values: Tensor, count: int) -> None:
    if name not in kept:
        kept[name] = torch.empty(count, *values.shape[1:], dtype=values.dtype)
    kept[name][indices] = values


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _token_indices(starts: Tensor, texts: Tensor) -> Tensor:
    lengths = starts[texts + 1] - starts[texts]
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) + (starts[texts] - ends + lengths).repeat_interleave(lengths)


def _store(answers: Mapping[str, Tensor], keys: Sequence[bytes], folder: Path) -> Path:
    """Write one more part, all of it or nothing."""
    part = folder / hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    draft = CACHE / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), -1)
    safetensors.torch.save_file({**answers, "keys": names}, draft / _FILE)
    write_manifest(draft)
    publish(draft, part)
    return part


def _collect(places: Sequence[tuple[Path, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Gather the answers in the order of `places` from the parts they lie in, one tensor of one part at a time.

    Returns:
        the tensors by name, and where each text's tokens begin in those that are per token.
    """
    by_part: dict[Path, list[int]] = defaultdict(list)
    for index, (part, _) in enumerate(places):
        by_part[part].append(index)
    lengths = torch.empty(len(places), dtype=torch.int64)
    for part, indices in by_part.items():
        lengths[indices] = _tensor(part, "starts").diff()[[places[index][1] for index in indices]]
    starts = _starts(lengths)
    found: dict[str, Tensor] = {}
    for part, indices in by_part.items():
        target, origin = torch.tensor(indices), torch.tensor([places[index][1] for index in indices])
        _put(found, "logits", target, _tensor(part, "logits")[origin], len(places))
        target, origin = _token_indices(starts, target), _token_indices(_tensor(part, "starts"), origin)
        for name in sorted(_names(part) - {"keys", "starts", "logits"}):
            _put(found, name, target, _tensor(part, name)[origin], int(starts[-1]))
    return found, starts


def _names(part: Path) -> set[str]:
    with safetensors.safe_open(part / _FILE, "pt") as stored:
        return set(stored.keys())


def _tensor(part: Path, name: str) -> Tensor:
    with safetensors.safe_open(part / _FILE, "pt") as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


def _forget_unused(used: set[Path]) -> None:
    """Remove the parts unused for the longest until the cache is under its limit; those just used stay."""
    now = time.time_ns()  # the system's own stamp is too coarse
    for part in used:
        os.utime(part, ns=(now, now))
    parts = {path: _size(path) for path in CACHE.glob("*/*") if path.is_dir()}
    excess = sum(parts.values()) - CACHE_BYTES
    for part in sorted(parts.keys() - used, key=lambda path: path.stat().st_mtime_ns):
        if excess <= 0:
            return
        shutil.rmtree(part)
        excess -= parts[part]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())

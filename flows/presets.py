"""Presets: whole params files for well-known tasks, put in place of `params.yaml` without losing anyone's edits."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any

import yaml

from stages.core.errors import UserError
from stages.core.params import parse_params
from stages.core.stage import PARAMS

PRESETS = Path("presets")
BACKUP = Path("params.yaml.bak")


def preset_names() -> list[str]:
    """Return the names of the project's presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def use_preset(name: str, force: bool) -> Path | None:
    """Write a preset over `params.yaml`, comments and all; return the backup of what was there, if one was needed.

    Args:
        name: of the preset.
        force: also if `params.yaml` holds edits.

    Raises:
        UserError: if there is no such preset, it is not valid, or `params.yaml` holds edits.
    """
    text = _preset_text(name)
    old = PARAMS.read_text(encoding="utf-8") if PARAMS.exists() else None
    if old == text:
        return None
    if old is not None and not force and not _is_some_preset(old):
        raise UserError(
            f"{PARAMS}: has edits that are in no preset; `headroom use {name} --force` keeps them in {BACKUP}"
        )
    backup = _back_up(old)
    draft = PARAMS.with_name(f".{PARAMS.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(PARAMS)
    return backup


def _preset_text(name: str) -> str:
    path = PRESETS / f"{name}.yaml"
    names = preset_names()
    if not names:
        raise UserError(f"{PRESETS.resolve()}: no presets here; run in the folder of a Headroom project")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{name}: no such preset; {hint}the presets are: {', '.join(names)}")
    text = path.read_text(encoding="utf-8")
    parse_params(yaml.safe_load(text), str(path))
    return text


def _back_up(old: str | None) -> Path | None:
    """Keep the old file unless it is a preset to the letter, comments included."""
    if old is None or any(_text_of(name) == old for name in preset_names()):
        return None
    shutil.copyfile(PARAMS, BACKUP)
    return BACKUP


def _is_some_preset(text: str) -> bool:
    """Tell whether the values are those of a preset; comments do not count."""
    values = _values(text)
    return values is not None and any(values == _values(_text_of(name)) for name in preset_names())


def _text_of(name: str) -> str:
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def _values(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None

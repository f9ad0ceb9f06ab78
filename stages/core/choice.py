"""Which runtime answers soonest, and which answers most, on one machine: `runtime.json`.

The evaluate stage measures and writes it beside its metrics, never into the folder of a model: the same weights keep
the same hash. A choice counts only on the machine that made it, told by its fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.artifacts import read_json, text_sha256, write_json
from stages.core.cascade import Exported, ExportedRuntime, open_exported
from stages.core.errors import UserError
from stages.core.hardware import describe_hardware
from stages.core.runtimes import REFERENCE_RUNTIME, Goal, available_runtimes

RUNTIME_FILE = "runtime.json"
FORMAT = 2
_BATCH_TOKENS = 512
_GOALS: tuple[Goal, ...] = ("latency", "throughput")


@dataclass(frozen=True)
class Setting:
    """How to run a model."""

    runtime: str
    """One of `available_runtimes`."""
    threads: int | None
    """Of one inference; None leaves it to the runtime."""
    streams: int | None
    """Inferences side by side; None leaves it to the runtime."""
    precision: str | None
    """Of float arithmetic, one of the runtime's `precisions`; None leaves it to the runtime."""
    batch_tokens: int
    """Tokens in a batch at most, padding included."""


DEFAULT = Setting(REFERENCE_RUNTIME, None, None, None, _BATCH_TOKENS)
"""Where nothing was measured."""


def open_setting(setting: Setting, model: Exported, goal: Goal) -> ExportedRuntime:
    """Load a model, or both of a cascade, as a setting says."""
    return open_exported(setting.runtime, model, setting.threads, goal, setting.streams, setting.precision)


def write_choice(path: Path, settings: Mapping[Goal, Setting], measured: Mapping[str, Any]) -> None:
    """Write a choice with this machine's fingerprint.

    Args:
        path: of the file.
        settings: for `latency` and for `throughput`.
        measured: what the choice rests on, for the reader.
    """
    hardware = describe_hardware()
    chosen = {goal: asdict(setting) for goal, setting in settings.items()}
    known = {"format": FORMAT, "fingerprint": fingerprint(hardware), "cpu": hardware["cpu"]}
    write_json(path, {**known, **chosen, "measured": dict(measured)})


def read_choice(path: Path, goal: Goal) -> tuple[Setting, str | None]:
    """Read a choice for a goal.

    Returns:
        the setting, and why it is the default where the file's does not count here: None where it does.

    Raises:
        UserError: if the file is not one of `write_choice`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not set(_GOALS) <= set(content):
        raise UserError(f"{path}: is not a runtime choice of format {FORMAT}; run `dvc repro evaluate` to make it anew")
    if content["fingerprint"] != fingerprint(describe_hardware()):
        return DEFAULT, f"{path}: measured on another machine, or with other versions"
    setting = Setting(**content[goal])
    if setting.runtime not in available_runtimes():
        return DEFAULT, f"{path}: {setting.runtime} was the fastest but is not installed here"
    return setting, None


def fingerprint(hardware: Mapping[str, Any]) -> str:
    """Sum up a machine as `describe_hardware` tells it."""
    return text_sha256(json.dumps(hardware, sort_keys=True))

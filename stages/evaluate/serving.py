"""A process that only serves: how long until its first answer, and how much memory it takes.

`python -m stages.evaluate.serving` is that process; `watch_serving` asks it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.cascade import load_exported, predict_exported
from stages.core.choice import Setting, open_setting
from stages.core.fresh import answer_request, ask_fresh_process
from stages.core.hardware import peak_memory_mb, resident_memory_mb

_SECONDS = 300.0


@dataclass(frozen=True)
class Serving:
    """What a fresh process told of itself."""

    peak_memory_mb: float
    """Peak resident memory in MiB."""
    resident_memory_mb: float
    """Resident memory in MiB after all texts were answered: what a service holds from then on."""
    import_seconds: float
    """From the start of the process until its modules are there."""
    load_seconds: float
    """Files checked, tokenizer read, runtime imported, model ready."""
    answer_seconds: float
    """Of the first text."""

    @property
    def cold_start_seconds(self) -> float:
        """From the start of the process to its first answer. The files lie in the system's cache of the disk."""
        return self.import_seconds + self.load_seconds + self.answer_seconds


def watch_serving(model: Path, setting: Setting, texts: Sequence[str]) -> Serving:
    """Let a fresh process answer the first text, then all of them.

    Raises:
        FreshProcessError: if that process fails.
    """
    request = {"model": str(model), "setting": asdict(setting), "texts": list(texts), "started": time.time()}
    return Serving(**ask_fresh_process(__spec__.name, request, _SECONDS))


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    imported = time.time()
    model = load_exported(Path(request["model"]))
    setting = Setting(**request["setting"])
    runtime = open_setting(setting, model, "throughput")
    loaded = time.time()
    predict_exported(model, runtime, request["texts"][:1], 1)
    answered = time.time()
    predict_exported(model, runtime, request["texts"], batch_tokens=setting.batch_tokens)
    resident = resident_memory_mb()
    return {
        # Linux keeps the two in counters of their own, of which the running one may be some pages ahead.
        "peak_memory_mb": max(peak_memory_mb(), resident),
        "resident_memory_mb": resident,
        "import_seconds": imported - request["started"],
        "load_seconds": loaded - imported,
        "answer_seconds": answered - loaded,
    }


if __name__ == "__main__":
    answer_request(_serve)

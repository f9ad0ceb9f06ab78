"""Peak memory of a process that only serves: load the model, answer the texts, report.

`python -m stages.evaluate.memory` is that process; `serving_memory_mb` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.core.cascade import load_exported, predict_exported
from stages.core.choice import Setting, open_setting
from stages.core.fresh import answer_request, ask_fresh_process
from stages.core.hardware import peak_memory_mb

_SECONDS = 300.0


def serving_memory_mb(model: Path, setting: Setting, texts: Sequence[str]) -> float:
    """Peak resident memory in MiB of a fresh process that answers the texts.

    Raises:
        FreshProcessError: if that process fails.
    """
    request = {"model": str(model), "setting": asdict(setting), "texts": list(texts)}
    return float(ask_fresh_process(__spec__.name, request, _SECONDS)["peak_memory_mb"])


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    model = load_exported(Path(request["model"]))
    setting = Setting(**request["setting"])
    runtime = open_setting(setting, model, "throughput")
    predict_exported(model, runtime, request["texts"], batch_tokens=setting.batch_tokens)
    return {"peak_memory_mb": peak_memory_mb()}


if __name__ == "__main__":
    answer_request(_serve)

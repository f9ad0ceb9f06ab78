"""Peak memory of a process that only serves: load the model, answer the texts, report.

`python -m stages.evaluate.memory` is that process; `serving_memory_mb` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.core.cascade import load_exported, open_exported, predict_exported
from stages.core.fresh import answer_request, ask_fresh_process
from stages.core.hardware import peak_memory_mb

_SECONDS = 300.0


def serving_memory_mb(model: Path, runtime: str, texts: Sequence[str], batch_size: int) -> float:
    """Peak resident memory in MiB of a fresh process that answers the texts.

    Raises:
        FreshProcessError: if that process fails.
    """
    request = {"model": str(model), "runtime": runtime, "texts": list(texts), "batch_size": batch_size}
    return float(ask_fresh_process(__spec__.name, request, _SECONDS)["peak_memory_mb"])


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    model = load_exported(Path(request["model"]))
    runtime = open_exported(request["runtime"], model, goal="throughput")
    predict_exported(model, runtime, request["texts"], request["batch_size"])
    return {"peak_memory_mb": peak_memory_mb()}


if __name__ == "__main__":
    answer_request(_serve)

"""PyTorch itself, with the checkpoint as transformers loads it: eager, compiled, and in bfloat16.

Attention is PyTorch's fused one (`sdpa`), the default of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.running import TorchService
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task

MODEL = "checkpoint"


def compress(variant: str, task: Task, out: Path) -> None:
    """Nothing to do: the checkpoint is served as it is, through a link."""
    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL).symlink_to(task.checkpoint)


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load the checkpoint: `fp32`, `bf16`, `compiled`, or `compiled-bf16`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / MODEL).eval()
    if "bf16" in variant:
        model = model.to(torch.bfloat16)
    if "compiled" in variant:
        model = torch.compile(model, dynamic=True)
    return TorchService(model, threads)

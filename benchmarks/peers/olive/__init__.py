"""Microsoft Olive's one command: `olive auto-opt --precision int8` for ONNX Runtime on the CPU.

https://microsoft.github.io/Olive/how-to/cli/cli-auto-opt.html
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.peers.running import OnnxService
from benchmarks.peers.service import Service
from benchmarks.peers.task import Task

_DEVICE = ("--device", "cpu", "--provider", "CPUExecutionProvider")


def compress(variant: str, task: Task, out: Path) -> None:
    """Make what the command makes of the checkpoint at a precision: `int8` or `fp32`."""
    command = [sys.executable, "-m", "olive", "auto-opt", "--disable_telemetry"]
    command += ["--model_name_or_path", str(task.checkpoint), "--task", "text-classification", *_DEVICE]
    command += ["--precision", variant, "--output_path", str(out)]
    subprocess.run(command, check=True)


def open_service(variant: str, folder: Path, goal: str, threads: int | None) -> Service:
    """Load what `compress` made."""
    (path,) = folder.rglob("*.onnx")
    return OnnxService(path, threads)

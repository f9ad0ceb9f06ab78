"""What this machine offers to run the model on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.core.hardware import describe_hardware
from stages.core.runtimes import REFERENCE_RUNTIME, OpenVino, gpu_runtimes

CPU_CONTENDERS = (REFERENCE_RUNTIME, OpenVino.name)
TORCH_CONTENDERS = tuple(
    f"torch-{mode}-{precision}" for mode in ("eager", "compiled", "graphs") for precision in ("fp16", "bf16")
)

_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


def take_inventory() -> dict[str, Any]:
    """List the hardware, the execution providers of ONNX Runtime and the devices of OpenVINO."""
    import onnxruntime
    import openvino

    hardware = describe_hardware()
    return {
        **hardware,
        "gpu": "present" if hardware["gpus"] or _driver_has_gpus(_DRIVER_GPUS) else "absent",
        "execution_providers": onnxruntime.get_available_providers(),
        "openvino_devices": openvino.Core().available_devices,
    }


def gpu_contenders() -> list[str]:
    """What the installed packages can run on the GPU; call it only where there is one."""
    import torch

    return [*gpu_runtimes(), *(TORCH_CONTENDERS if torch.cuda.is_available() else ())]


def _driver_has_gpus(folder: Path) -> bool:
    """A container may see the GPU without having nvidia-smi."""
    return folder.is_dir() and any(folder.iterdir())

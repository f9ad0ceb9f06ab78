"""Which number format the matrix products of training run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from stages.core.hardware import describe_cpu
from stages.core.params import Precision

Resolved = Literal["fp32", "bf16", "fp16"]
_FAST_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


def resolve_precision(wanted: Precision) -> Resolved:
    """Say what `auto` means on the machine at hand; every other precision is taken as it is.

    bf16 where the hardware multiplies it natively, fp16 on older GPUs, and fp32 elsewhere.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if _FAST_BF16 & set(describe_cpu()["features"]) else "fp32"


def autocast(wanted: Precision) -> AbstractContextManager[object]:
    """Compute matrix products on the CPU in the precision wanted, outside the training loop."""
    precision = resolve_precision(wanted)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])

"""Which number format the matrix products of training run in, and what half precision needs beside."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from stages.core.hardware import TrainingPrecision, training_precision_here
from stages.core.params import Precision

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: Precision) -> TrainingPrecision:
    """Say what `auto` means on the machine at hand; every other precision is taken as it is.

    bf16 where the hardware multiplies it natively, fp16 on older GPUs with tensor cores, and fp32 elsewhere. The
    fingerprint records the answer, so that a stage trained elsewhere with another one is made anew.
    """
    return training_precision_here() if wanted == "auto" else wanted


def autocast(wanted: Precision, device: str = "cpu") -> AbstractContextManager[object]:
    """Compute matrix products on a device of this type in the precision wanted."""
    precision = resolve_precision(wanted)
    return nullcontext() if precision == "fp32" else torch.autocast(device, _TYPES[precision])


def build_accelerator(precision: TrainingPrecision) -> Accelerator:
    """Build the accelerator of a training run, whose `scaler` scales the loss in fp16 and does nothing elsewhere.

    Gradients that fp16 would round to nothing are kept by multiplying the loss (1710.03740). The scale starts at
    65,536, is halved by an overflow, whose step is left out, and doubled after 2,000 steps without one. On GPUs,
    products of fp32 are computed in TF32, with inputs of 10 bits behind the point.
    """
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if accelerator.scaler is None:  # accelerate scales on GPUs alone
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
    return accelerator


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], maximum_norm: float
) -> float:
    """Bring the gradients back from the scale of the loss and clip them to a norm; return the norm they had."""
    accelerator.scaler.unscale_(optimizer)
    return float(accelerator.clip_grad_norm_(weights, maximum_norm))

"""Does the exported graph compute what PyTorch computes?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import onnxruntime
from torch import nn

from stages.core.batches import length_batches, pad
from stages.core.checkpoints import logits_of
from stages.core.tensors import pad_tensors

_BATCH_SIZES = (1, 5, 16)


def largest_difference(
    model: nn.Module, path: Path, rows: Sequence[Sequence[int]], pad_id: int, names: Sequence[str]
) -> float:
    """Compare logits on real texts, alone and in batches, which pads some of them.

    Args:
        model: the PyTorch checkpoint.
        path: of the ONNX file.
        rows: token ids of texts.
        pad_id: token id that fills short texts.
        names: of the ONNX inputs.

    Returns:
        the largest absolute difference of a logit, infinite where ONNX Runtime gives no number.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in _BATCH_SIZES:
        # Texts far apart in length share a batch here, so that padding is tried too.
        order = list(length_batches(list(range(len(rows))), size))
        for batch in order:
            chosen = [rows[i] for i in batch]
            wanted = logits_of(model, pad_tensors(chosen, pad_id)).numpy()
            given = session.run(None, dict(zip(names, pad(chosen, pad_id), strict=True)))[0]
            if not numpy.isfinite(given).all():
                return float("inf")
            worst = max(worst, float(numpy.abs(given - wanted).max()))
    return worst

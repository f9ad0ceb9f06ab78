"""What is trained: the values that both sides share, and the params file that tells them to Headroom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.methods.declared import NOTHING, changed


@dataclass(frozen=True)
class Shared:
    """Values that hold for Headroom and the Trainer alike."""

    precision: str = "bf16"
    warmup: float = 0.1
    """Share of the steps; the rate falls linearly afterwards."""
    weight_decay: float = 0.01
    """Of matrices; neither side decays biases and norms."""
    maximum_gradient_norm: float = 1.0
    mask_probability: float = 0.15
    block_length: int = 128
    pretrain_batch_tokens: int = 2048
    pretrain_learning_rate: float = 1e-4
    finetune_batch_tokens: int = 448
    """Padding included: Headroom's way to say `finetune_batch_texts`; a text of TREC-6 has 13.5 tokens."""
    finetune_batch_texts: int = 32
    finetune_learning_rate: float = 1e-4
    finetune_epochs: int = 3
    finetuned_epochs: int = 2
    """After which it is stopped: the accuracy asked for is reached by then, and the clock is what counts."""


SHARED = Shared()
WARM_UP_STEPS = 2
"""That no speed counts."""


def pretrain_params(base: Mapping[str, Any], steps: int, corpus_tokens: int, heldout: float) -> dict[str, Any]:
    """Params of a pretraining run.

    Args:
        base: a whole params file; what is not named here stays as it is there.
        steps: of the run.
        corpus_tokens: to pack, held-out ones included.
        heldout: share of the blocks that the stage keeps for its own evaluation, which the clock leaves out.
    """
    return changed(
        base,
        {
            "tokenize.block_length": SHARED.block_length,
            "tokenize.documents": "apart",
            "tokenize.corpus_tokens": corpus_tokens,
            "tokenize.heldout_fraction": heldout,
            "pretrain.steps": steps,
            "pretrain.evaluations": 1,
            "pretrain.objective": {
                "kind": "masked",
                "mask_probability": SHARED.mask_probability,
                "final_mask_probability": None,
                "whole_words": False,
            },
            **_optimizer("pretrain", SHARED.pretrain_batch_tokens, SHARED.pretrain_learning_rate),
        },
    )


def finetune_params(base: Mapping[str, Any]) -> dict[str, Any]:
    """Params of a fine-tuning run: cross-entropy and AdamW, none of the extras that the Trainer lacks."""
    return changed(
        base,
        {
            **NOTHING,
            "finetune.epochs": SHARED.finetune_epochs,
            "finetune.patience": SHARED.finetune_epochs,
            "finetune.repeats": {"seeds": 1, "folds": 0},
            **_optimizer("finetune", SHARED.finetune_batch_tokens, SHARED.finetune_learning_rate),
        },
    )


def _optimizer(stage: str, batch_tokens: int, learning_rate: float) -> dict[str, Any]:
    return {
        f"{stage}.optimizer.kind": "adamw",
        f"{stage}.optimizer.betas": [0.9, 0.999],
        f"{stage}.optimizer.averaging": None,
        f"{stage}.optimizer.batch_tokens": batch_tokens,
        f"{stage}.optimizer.learning_rate": learning_rate,
        f"{stage}.optimizer.weight_decay": SHARED.weight_decay,
        f"{stage}.optimizer.schedule": {"kind": "linear", "warmup": SHARED.warmup},
        f"{stage}.optimizer.maximum_gradient_norm": SHARED.maximum_gradient_norm,
        f"{stage}.optimizer.precision": SHARED.precision,
    }

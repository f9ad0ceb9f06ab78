"""Child processes that start in an instant: forked from a server that has the libraries loaded and no threads yet."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "stages.core.stage",
        "stages.core.training.loop",
        "stages.pretrain.model",
        "stages.finetune.adversarial",
        "stages.distill.student",
        "stages.core.distillation",
        "transformers.models.bert.modeling_bert",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ]
)

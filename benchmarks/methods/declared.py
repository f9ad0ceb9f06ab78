"""The methods: each is plain fine-tuning with a few values of params.yaml changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.core.errors import UserError

Changes = Mapping[str, Any]
"""New values by the dotted path of their param."""

NOTHING: Changes = {
    "finetune.dropout": None,
    "finetune.label_smoothing": 0.0,
    "finetune.focal_gamma": 0.0,
    "finetune.class_weights": None,
    "finetune.r_drop": 0.0,
    "finetune.layer_decay": 1.0,
    "finetune.reinitialized_layers": 0,
    "finetune.adversarial": None,
    "finetune.mixup": 0.0,
    "finetune.augmentation": {"edits": None, "guesses": None},
    "finetune.efficient": None,
    "finetune.self_training": None,
    "finetune.optimizer.averaging": None,
}
"""Plain fine-tuning: AdamW with the weight decay of the params, everything else off."""

PLAIN = "plain"
OF_THE_TASK = "that of distill.transfer"
"""Stands for the pattern by which the task's params know texts of the corpus that are like its own."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune."""

    name: str
    title: str
    changes: Changes = field(default_factory=dict)
    """Of plain fine-tuning."""
    as_shipped: bool = False
    """Whether it starts from the params as they are, and not from plain fine-tuning."""

    def params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The params of a run with this method, from those of the task."""
        params = changed(raw, self.changes if self.as_shipped else {**NOTHING, **self.changes})
        own = params["finetune"]["self_training"]
        if own is not None and own["pattern"] == OF_THE_TASK:
            own["pattern"] = raw["distill"]["transfer"]["pattern"]
        return params


METHODS: Sequence[Method] = (
    Method(PLAIN, "plain fine-tuning"),
    Method("shipped", "as the preset has it", as_shipped=True),
    # Decay
    Method("no_decay", "no weight decay", {"finetune.optimizer.weight_decay": 0.0}),
    Method("strong_decay", "weight decay 0.1", {"finetune.optimizer.weight_decay": 0.1}),
    # Noise within the model
    Method("dropout", "dropout 0.2", {"finetune.dropout": 0.2}),
    Method("r_drop", "R-Drop", {"finetune.r_drop": 1.0}),
    # Labels and losses
    Method("label_smoothing", "label smoothing", {"finetune.label_smoothing": 0.1}),
    Method("focal", "focal loss", {"finetune.focal_gamma": 2.0}),
    Method("balanced", "balanced class weights", {"finetune.class_weights": {"kind": "balanced"}}),
    Method(
        "effective_number",
        "class weights by effective number",
        {"finetune.class_weights": {"kind": "effective_number", "beta": 0.999}},
    ),
    # Layers
    Method("layer_decay", "layer-wise learning rates", {"finetune.layer_decay": 0.9}),
    Method("fresh_layer", "fresh top layer", {"finetune.reinitialized_layers": 1}),
    # Adversaries
    Method("fgm", "adversarial, FGM", {"finetune.adversarial": {"kind": "fgm", "epsilon": 1.0}}),
    Method(
        "freelb",
        "adversarial, FreeLB",
        {"finetune.adversarial": {"kind": "freelb", "steps": 3, "step_size": 0.1, "epsilon": 0.6}},
    ),
    # More texts
    Method(
        "edits",
        "word edits (EDA)",
        {
            "finetune.augmentation.edits": {
                "copies": 2, "synonyms": 0.1, "insertions": 0.1, "swaps": 0.1, "deletions": 0.1,
            }
        },
    ),
    Method(
        "guesses",
        "masked words guessed anew",
        {"finetune.augmentation.guesses": {"copies": 1, "mask_probability": 0.15, "candidates": 10}},
    ),
    Method("mixup", "mixup of embeddings", {"finetune.mixup": 0.4}),
    # Fewer weights
    Method(
        "lora",
        "LoRA",
        {
            "finetune.efficient": {"kind": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": "all"},
            "finetune.optimizer.learning_rate": 1.0e-3,
        },
    ),
    Method(
        "adalora",
        "AdaLoRA",
        {
            "finetune.efficient": {
                "kind": "adalora", "rank": 8, "start_rank": 12, "alpha": 16.0, "dropout": 0.05, "orthogonality": 0.5,
                "warmup": 0.1, "cooldown": 0.5, "targets": "all",
            },
            "finetune.optimizer.learning_rate": 1.0e-3,
        },
    ),
    Method(
        "ia3", "IA3", {"finetune.efficient": {"kind": "ia3"}, "finetune.optimizer.learning_rate": 5.0e-3}
    ),
    Method(
        "adapters",
        "bottleneck adapters",
        {"finetune.efficient": {"kind": "adapters", "width": 32}, "finetune.optimizer.learning_rate": 1.0e-3},
    ),
    Method(
        "prefix",
        "prefix tuning",
        {"finetune.efficient": {"kind": "prefix", "length": 16}, "finetune.optimizer.learning_rate": 5.0e-3},
    ),
    # Own labels
    Method(
        "self_training",
        "self-training",
        {
            "finetune.self_training": {
                "rounds": 1, "confidence": 0.9, "texts": 2000, "candidates": 20000, "pattern": OF_THE_TASK,
            }
        },
    ),
    # Averages of weights
    Method("averaging", "average of weights (EMA)", {"finetune.optimizer.averaging": 0.99}),
)  # fmt: skip


def choose(names: Sequence[str]) -> list[Method]:
    """Take the methods of these names, and plain fine-tuning that all are compared with; no names take all.

    Raises:
        UserError: if there is no such method.
    """
    known = [method.name for method in METHODS]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such method; there are {', '.join(known)}")
    return [method for method in METHODS if not names or method.name in (PLAIN, *names)]


def changed(raw: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Copy params with some values replaced.

    Raises:
        UserError: if a path is not there.
    """
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = result
        for parent in parents:
            inner = inner.get(parent, {})
        if last not in inner:
            raise UserError(f"{path}: no such param in the params of the task")
        inner[last] = copy.deepcopy(value)
    return result

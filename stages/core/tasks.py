"""Task kinds: what a model is for, in one small object that the stages ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.metrics import score


@dataclass(frozen=True)
class LossOptions:
    """How a training loss differs from plain cross-entropy."""

    smoothing: float = 0.0
    """Share of a label that is spread over all classes (1512.00567)."""
    focal_gamma: float = 0.0
    """Power of the chance missed by which a text is weighed (1708.02002)."""
    class_weights: Tensor | None = None
    """Weight of each class, [classes]; None weighs all 1."""


PLAIN = LossOptions()


class Task(Protocol):
    """What stages ask of a task kind."""

    onnx_inputs: Sequence[str]
    onnx_output: str

    def build_model(self, checkpoint: Path, labels: Sequence[str]) -> nn.Module:
        """Put a fresh head on a checkpoint."""

    def loss(self, logits: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
        """Training loss against true labels, a mean over texts; label -1 marks a text without one."""

    def soft_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Divergence from a teacher's logits."""

    def score(self, metric: str, logits: Tensor, labels: numpy.ndarray) -> float:
        """Quality of logits, larger is better."""


class TextClassification:
    """One label a text."""

    onnx_inputs = ("input_ids", "attention_mask")
    onnx_output = "logits"

    def build_model(self, checkpoint: Path, labels: Sequence[str]) -> nn.Module:
        """Put a fresh classification head on a checkpoint.

        Raises:
            UserError: if the architecture has no such head.
        """
        config = transformers.AutoConfig.from_pretrained(
            checkpoint,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        auto = transformers.AutoModelForSequenceClassification
        if type(config) not in auto._model_mapping:
            raise UserError(f"{checkpoint}: transformers has no text classifier of model_type {config.model_type}")
        if config.pad_token_id is None:  # decoders judge a text by its last token, and must know which one that is
            raise UserError(f"{checkpoint}: config.json has no pad_token_id; set it to the tokenizer's")
        model: nn.Module = auto.from_pretrained(checkpoint, config=config, use_safetensors=True, dtype=torch.float32)
        return model

    def loss(self, logits: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
        """Cross-entropy; label -1 marks a text without one.

        Weights do not change what the mean is divided by, the number of texts with a label, so that a batch may be
        cut into parts.
        """
        labelled = labels >= 0
        if not labelled.any():
            return logits.sum() * 0.0
        if not options.focal_gamma and options.class_weights is None:
            return functional.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=options.smoothing)
        logits, labels = logits[labelled], labels[labelled]
        weights = None if options.class_weights is None else options.class_weights.to(logits)
        each = functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=options.smoothing, reduction="none"
        )
        if options.focal_gamma:
            each = each * (options.focal_gamma * _log_chance_missed(logits, labels)).exp()
        return each.mean()

    def soft_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Kullback-Leibler divergence at a temperature, scaled by its square (Hinton et al., 1503.02531)."""
        student = functional.log_softmax(logits / temperature, dim=-1)
        teacher = functional.log_softmax(teacher_logits / temperature, dim=-1)
        return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2

    def score(self, metric: str, logits: Tensor, labels: numpy.ndarray) -> float:
        """Quality of logits [n, classes] by accuracy, f1_macro or f1_weighted."""
        return score(metric, logits.argmax(dim=-1).numpy(), labels)


def _log_chance_missed(logits: Tensor, labels: Tensor) -> Tensor:
    """Logarithm of what a model leaves to the wrong classes, [texts].

    Any power of the chance itself has an infinite gradient somewhere below 1; that of the logarithm is bounded.
    """
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong.logsumexp(dim=-1) - logits.logsumexp(dim=-1)


_TASKS: dict[str, Any] = {"text-classification": TextClassification}


def get_task(kind: str) -> Task:
    """Return the task of a kind that `params.yaml` allows."""
    task: Task = _TASKS[kind]()
    return task

"""Task kinds: what a model is for, in one small object that the stages ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.metrics import score


class Task(Protocol):
    """What stages ask of a task kind."""

    onnx_inputs: Sequence[str]
    onnx_output: str

    def build_model(self, checkpoint: Path, labels: Sequence[str]) -> nn.Module:
        """Put a fresh head on a checkpoint."""

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Training loss against true labels; label -1 marks a text without one."""

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

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy with label smoothing (1512.00567); label -1 marks a text without one."""
        if not (labels >= 0).any():
            return logits.sum() * 0.0
        return functional.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing)

    def soft_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Kullback-Leibler divergence at a temperature, scaled by its square (Hinton et al., 1503.02531)."""
        student = functional.log_softmax(logits / temperature, dim=-1)
        teacher = functional.log_softmax(teacher_logits / temperature, dim=-1)
        return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2

    def score(self, metric: str, logits: Tensor, labels: numpy.ndarray) -> float:
        """Quality of logits [n, classes] by accuracy, f1_macro or f1_weighted."""
        return score(metric, logits.argmax(dim=-1).numpy(), labels)


_TASKS: dict[str, Any] = {"text-classification": TextClassification}


def get_task(kind: str) -> Task:
    """Return the task of a kind that `params.yaml` allows."""
    task: Task = _TASKS[kind]()
    return task

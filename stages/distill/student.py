"""Students: chosen layers of the teacher, a narrower model of its family, or any checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stages.core.checkpoints import HEADROOM_FILE, load_model
from stages.core.distillation import check_same_tokenizer, labels_of
from stages.core.errors import UserError
from stages.core.params import NarrowStudent, StudentParams
from stages.core.structure import keep_layers
from stages.core.tasks import Task

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def build_student(
    params: StudentParams, teacher: nn.Module, task: Task, labels: Sequence[str], data: Path
) -> nn.Module:
    """Make the student that params ask for.

    Args:
        params: which student.
        teacher: may be changed; load it again to use it.
        task: gives a checkpoint its head.
        labels: names of the classes, by index.
        data: tokenized splits, with their tokenizer.

    Raises:
        UserError: if the teacher lacks a layer, or the checkpoint does not fit the data.
    """
    if params.kind == "layers":
        keep_layers(teacher, params.layers)
        return teacher
    if params.kind == "narrow":
        return narrow_student(params, teacher)
    folder = Path(params.path)
    check_same_tokenizer(folder, data / "tokenizer", "distill.student")
    return _from_checkpoint(folder, task, labels)


def narrow_student(params: NarrowStudent, teacher: nn.Module) -> nn.Module:
    """Make a new model with the teacher's vocabulary, activation and head; only its embeddings are not random.

    They are the teacher's, projected on the directions in which its word embeddings reach farthest: of all matrices
    of this rank the one nearest to the teacher's (Eckart & Young 1936), so inner products between words stay as near
    as they can. All tables share the projection, because their rows are added.

    Args:
        params: the shape.
        teacher: any model of a family whose configuration names its parts as BERT does.
    """
    config: Any = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.hidden_size = params.layers, params.hidden
    config.num_attention_heads, config.intermediate_size = params.heads, params.neurons
    student: nn.Module = type(teacher)(config)  # type: ignore[call-arg]
    theirs, own = _embedding_tables(teacher), _embedding_tables(student)
    width, own_width = (tables[_TABLES[0]].shape[1] for tables in (theirs, own))
    directions = _directions(theirs[_TABLES[0]], own_width) if own_width < width else torch.eye(width)
    for name, table in theirs.items():
        own[name][:, : directions.shape[1]] = table @ directions
    return student


def _directions(table: Tensor, count: int) -> Tensor:
    """The `count` right singular vectors of a table with the largest singular values, [width, count]."""
    values = table.double()
    _, vectors = torch.linalg.eigh(values.T @ values)  # ascending
    largest: Tensor = vectors[:, -count:].flip(1)
    return largest.float()


def _embedding_tables(model: nn.Module) -> dict[str, Tensor]:
    """Embedding weights by the name of their table; the tensors are the model's own."""
    tables = {name.rpartition(".")[2]: part for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    return {name: tables[name].weight.data for name in _TABLES if name in tables}


def _from_checkpoint(folder: Path, task: Task, labels: Sequence[str]) -> nn.Module:
    """Load a classifier that a stage wrote as it is, whatever its widths; put a head on anything else."""
    config = transformers.AutoConfig.from_pretrained(folder)
    classifies = str((config.architectures or [""])[0]).endswith("ForSequenceClassification")
    own = labels_of(folder)
    if classifies and len(own) == len(labels) and set(own) == set(labels) and own != list(labels):
        raise UserError(f"distill.student: {folder} knows the labels {own}, the data has {list(labels)}")
    if classifies and own == list(labels) and (folder / HEADROOM_FILE).exists():
        return load_model(folder)
    return _with_head(folder, task, labels)


def _with_head(folder: Path, task: Task, labels: Sequence[str]) -> nn.Module:
    try:
        return task.build_model(folder, labels)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"distill.student: {folder} cannot get a head for {len(labels)} labels: {reason}; take a checkpoint "
            "that was not pruned, quantized or trained for other labels"
        ) from None

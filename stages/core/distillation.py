"""A student learns from a teacher: the teacher's answers, computed once, and the loss against them.

Soft labels at a temperature (Hinton et al., 1503.02531), true labels where there are any, and the hidden states of
chosen layers (TinyBERT, 1909.10351).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from stages.core.artifacts import ARTIFACTS, digest, publish, text_sha256, verify, write_manifest
from stages.core.batches import length_batches
from stages.core.checkpoints import load_model, load_tokenizer
from stages.core.examples import Examples, load_dataset, load_examples, load_maximum_length, load_pad_id
from stages.core.judging import judge
from stages.core.observe.progress import track
from stages.core.params import DistillParams, DistillWeights, OptimizerParams, Precision, TransferParams
from stages.core.stage import StageRun
from stages.core.tasks import Task
from stages.core.tensors import pad_tensors, shuffled_batches, to_device
from stages.core.training import Batch, Recipe

_CACHE = ARTIFACTS / ".cache" / "teacher"
_BATCH_SIZE = 64


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of every text."""

    logits: Tensor
    """float32 [texts, classes]."""
    hidden: list[Tensor]
    """For each chosen layer, the hidden states of all texts' tokens end to end, bfloat16 [tokens, hidden]."""
    starts: Tensor
    """Where each text's tokens begin in `hidden`, int64 [texts + 1]."""


@dataclass(frozen=True)
class Lesson:
    """Everything a student is taught with."""

    examples: Examples
    """The task's training texts, then unlabelled ones with label -1."""
    teacher: TeacherOutputs
    weights: DistillWeights
    temperature: float
    pad_id: int


def add_transfer_texts(
    examples: Examples, corpus: Path, params: TransferParams, tokenizer: Any, maximum_length: int, seed: int
) -> Examples:
    """Put unlabelled texts of the corpus behind the labelled ones.

    Args:
        examples: labelled.
        corpus: folder with `corpus.parquet`.
        params: how many, and which.
        tokenizer: of the model.
        maximum_length: in tokens; longer texts are cut.
        seed: of the draw.
    """
    if params.texts == 0:
        return examples
    wanted = re.compile(params.pattern)
    own = set(examples.texts)
    found = [
        text for text in load_dataset(corpus / "corpus.parquet")["text"] if wanted.search(text) and text not in own
    ]
    order = numpy.random.default_rng(seed).permutation(len(found))[: params.texts]
    texts = [found[index] for index in sorted(order.tolist())]
    if not texts:
        return examples
    rows = tokenizer(texts, truncation=True, max_length=maximum_length)["input_ids"]
    labels = numpy.concatenate([examples.labels, numpy.full(len(texts), -1)])
    return Examples(examples.texts + texts, examples.input_ids + rows, labels)


def build_lesson(params: DistillParams, teacher: Path, data: Path, corpus: Path, seed: int) -> Lesson:
    """Gather the texts and ask the teacher about them.

    Args:
        params: which texts and layers, and how the loss is weighted.
        teacher: checkpoint folder.
        data: tokenized splits.
        corpus: folder with `corpus.parquet`.
        seed: of the draw of unlabelled texts.
    """
    tokenizer, pad_id = load_tokenizer(data / "tokenizer"), load_pad_id(data)
    labelled = load_examples(data, "train")
    examples = add_transfer_texts(labelled, corpus, params.transfer, tokenizer, load_maximum_length(data), seed)
    layers = params.layers if params.weights.hidden else []
    outputs = teacher_outputs(teacher, examples, layers, pad_id, params.optimizer.precision)
    return Lesson(examples, outputs, params.weights, params.temperature, pad_id)


def teacher_outputs(
    teacher: Path, examples: Examples, layers: Sequence[int], pad_id: int, precision: Precision
) -> TeacherOutputs:
    """Ask the teacher about every text, once: the answers are kept on disk for this teacher, texts and layers.

    Args:
        teacher: checkpoint folder.
        examples: texts.
        layers: whose output is kept, counted from 0; empty keeps logits alone.
        pad_id: token id that fills short texts.
        precision: in which the teacher computes.
    """
    rows = repr(examples.input_ids)
    folder = _CACHE / text_sha256("\n".join([digest(teacher), rows, repr(list(layers)), precision]))[:16]
    if not folder.exists():
        # Loading draws random numbers; whether the answers were on disk must not show in what is trained next.
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = _ask(load_model(teacher), examples.input_ids, layers, pad_id)
        _store(outputs, folder)
    verify(folder)
    tensors = safetensors.torch.load_file(folder / "outputs.safetensors")
    hidden = [tensors[f"hidden/{index}"] for index in range(len(layers))]
    return TeacherOutputs(tensors["logits"], hidden, tensors["starts"])


def student_loss(student: nn.Module, task: Task, lesson: Lesson, layers: Sequence[int], batch: Batch) -> Tensor:
    """Weighted loss of a batch.

    Args:
        student: the model that learns.
        task: for the terms on logits.
        lesson: texts, teacher's outputs and weights.
        layers: student layers whose outputs are held against the kept teacher layers, in the same order.
        batch: indices of texts.
    """
    examples, teacher, weights = lesson.examples, lesson.teacher, lesson.weights
    inputs = to_device(pad_tensors([examples.input_ids[i] for i in batch], lesson.pad_id), student)
    output = student(**inputs, output_hidden_states=bool(teacher.hidden))
    logits = output.logits.float()
    indices = torch.tensor(list(batch))
    loss = weights.soft * task.soft_loss(logits, teacher.logits[indices].to(logits.device), lesson.temperature)
    if weights.hard:
        labels = torch.from_numpy(examples.labels[list(batch)]).to(logits.device)
        share = (labels >= 0).float().mean()  # a batch with few labels must not weigh them more
        loss = loss + weights.hard * share * task.loss(logits, labels, smoothing=0.0)
    for layer, hidden in zip(layers, teacher.hidden, strict=False):
        mask = inputs["attention_mask"].bool()
        wanted = torch.cat([hidden[teacher.starts[i] : teacher.starts[i + 1]] for i in batch])
        seen = output.hidden_states[layer + 1][mask].float()
        loss = loss + weights.hidden / len(layers) * (seen - wanted.to(seen.device).float()).square().mean()
    return loss


def distillation_recipe(
    student: nn.Module,
    task: Task,
    lesson: Lesson,
    layers: Sequence[int],
    validation: Examples,
    optimizer: OptimizerParams,
    epochs: int,
    run: StageRun,
) -> Recipe:
    """Describe the training of a student; see `student_loss`."""
    lengths = [len(row) for row in lesson.examples.input_ids]
    metric, seed = run.params.quality.metric, run.params.seed
    return Recipe(
        optimizer=optimizer,
        rounds=epochs,
        batches=lambda epoch: shuffled_batches(lengths, optimizer.batch_size, seed * 1000 + epoch),
        loss=lambda batch: student_loss(student, task, lesson, layers, batch),
        evaluate=lambda: judge(student, task, metric, validation, lesson.pad_id),
    )


def _ask(model: nn.Module, rows: Sequence[Sequence[int]], layers: Sequence[int], pad_id: int) -> TeacherOutputs:
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    settings: Any = model.config
    width = settings.hidden_size
    hidden = [torch.empty(int(starts[-1]), width, dtype=torch.bfloat16) for _ in layers]
    logits = torch.empty(len(rows), settings.num_labels)
    for batch in track(length_batches(lengths.tolist(), _BATCH_SIZE), "ask the teacher"):
        inputs = to_device(pad_tensors([rows[i] for i in batch], pad_id), model)
        with torch.inference_mode():
            output = model(**inputs, output_hidden_states=bool(layers))
        logits[torch.tensor(batch)] = output.logits.float().cpu()
        for kept, layer in zip(hidden, layers, strict=True):
            states = output.hidden_states[layer + 1].to("cpu", torch.bfloat16)
            for place, index in enumerate(batch):
                kept[starts[index] : starts[index + 1]] = states[place, : lengths[index]]
    return TeacherOutputs(logits, hidden, starts)


def _store(outputs: TeacherOutputs, folder: Path) -> None:
    """Keep the answers of one teacher; hidden states are large, so those of any other go first."""
    shutil.rmtree(_CACHE, ignore_errors=True)
    draft = folder.with_name(f"{folder.name}.draft")
    draft.mkdir(parents=True)
    tensors = {"logits": outputs.logits, "starts": outputs.starts}
    tensors |= {f"hidden/{index}": tensor for index, tensor in enumerate(outputs.hidden)}
    safetensors.torch.save_file(tensors, draft / "outputs.safetensors")
    write_manifest(draft)
    publish(draft, folder)

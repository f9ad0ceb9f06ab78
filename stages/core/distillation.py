"""A student learns from teachers: the texts, what the teachers say of them, and the loss against it.

Soft labels at a temperature (Hinton et al., 1503.02531), the mean of several teachers where there are more; true
labels where there are any; hidden states and attention maps of chosen layers (TinyBERT, 1909.10351); query, key and
value relations of one layer (MiniLMv2, 2012.15828).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn

from stages.core.artifacts import read_json, verify
from stages.core.augmentation import augmented_rows
from stages.core.checkpoints import HEADROOM_FILE, load_tokenizer
from stages.core.errors import UserError
from stages.core.examples import (
    Examples,
    load_dataset,
    load_examples,
    load_labels,
    load_maximum_length,
    load_pad_id,
)
from stages.core.judging import judge
from stages.core.noise import noised_rows
from stages.core.params import (
    AugmentationParams,
    DistillParams,
    DistillWeights,
    NoiseParams,
    OptimizerParams,
    StudentParams,
    TransferParams,
)
from stages.core.relations import recorded_projections, relation_loss
from stages.core.stage import StageRun
from stages.core.structure import attention_linears, encoder_layers, hidden_width, layer_widths
from stages.core.tasks import Task
from stages.core.teacher import Recorded, TeacherOutputs, average_logits, teacher_outputs
from stages.core.tensors import pad_tensors, shuffled_batches
from stages.core.training.loop import train
from stages.core.training.precision import autocast
from stages.core.training.recipe import Batch, Position, Recipe, Tensors

_PROJECTION = "distill_projection"


@dataclass(frozen=True)
class Lesson:
    """Everything a student is taught with."""

    examples: Examples
    """The task's training texts, then unlabelled ones with label -1."""
    teacher: TeacherOutputs
    """Its logits are the mean of all teachers."""
    weights: DistillWeights
    temperature: float
    pad_id: int
    attention_heads: list[int]
    """Of the teacher, for each layer whose attention is recorded."""
    relation_heads: int

    @property
    def layers(self) -> int:
        """How many teacher layers are held against student layers."""
        return max(len(self.teacher.hidden), len(self.teacher.attention))


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
    return _with_unlabelled(examples, texts, rows)


def add_augmented_texts(
    examples: Examples, source: Examples, params: AugmentationParams, language_model: Path, tokenizer: Any, seed: int
) -> Examples:
    """Put variants of the texts of `source` behind `examples`; see `augmented_rows`."""
    if params.copies == 0:
        return examples
    rows = augmented_rows(source.input_ids, params, language_model, tokenizer, seed)
    return _with_unlabelled(examples, tokenizer.batch_decode(rows, skip_special_tokens=True), rows)


def add_noised_texts(examples: Examples, source: Examples, params: NoiseParams, tokenizer: Any, seed: int) -> Examples:
    """Put broken variants of the texts of `source` behind `examples`; see `noised_rows`."""
    if params.copies == 0:
        return examples
    rows = noised_rows(source.input_ids, params, tokenizer, seed)
    return _with_unlabelled(examples, tokenizer.batch_decode(rows, skip_special_tokens=True), rows)


def _with_unlabelled(examples: Examples, texts: list[str], rows: list[list[int]]) -> Examples:
    labels = numpy.concatenate([examples.labels, numpy.full(len(rows), -1)])
    return Examples(examples.texts + texts, examples.input_ids + rows, labels)


def build_lesson(
    params: DistillParams, teacher: Path, data: Path, corpus: Path, seed: int, language_model: Path | None = None
) -> Lesson:
    """Gather the texts and ask the teachers about them.

    Args:
        params: which texts and layers, and how the loss is weighted.
        teacher: checkpoint folder; from it come all that is learnt of layers.
        data: tokenized splits.
        corpus: folder with `corpus.parquet`.
        seed: of the draw of unlabelled texts.
        language_model: checkpoint folder of the model that augments texts; None leaves augmented texts out.

    Raises:
        UserError: if a further teacher does not fit the data, or a layer is not there.
    """
    for name, path in params.checkpoints().items():
        check_same_tokenizer(Path(path), data / "tokenizer", name)
    for index, path in enumerate(params.teachers):
        check_teacher(Path(path), load_labels(data), f"distill.teachers[{index}]")
    recorded = what_to_record(params, layer_count(teacher))
    tokenizer, pad_id, maximum_length = load_tokenizer(data / "tokenizer"), load_pad_id(data), load_maximum_length(data)
    labelled = load_examples(data, "train")
    examples = add_transfer_texts(labelled, corpus, params.transfer, tokenizer, maximum_length, seed)
    examples = add_noised_texts(examples, labelled, params.transfer.noise, tokenizer, seed)
    precision = params.optimizer.precision
    if language_model is not None:
        augmentation = params.transfer.augmentation
        with autocast(precision):
            examples = add_augmented_texts(examples, labelled, augmentation, language_model, tokenizer, seed)
    outputs = teacher_outputs(teacher, examples.input_ids, recorded, precision)
    further = params.teachers if params.weights.soft else []
    others = [teacher_outputs(Path(path), examples.input_ids, Recorded(), precision) for path in further]
    logits = average_logits([outputs.logits, *(other.logits for other in others)], params.temperature)
    widths = read_json(teacher / HEADROOM_FILE)["widths"]
    heads = [widths[layer]["heads"] for layer in recorded.attention]
    return Lesson(
        examples, replace(outputs, logits=logits), params.weights, params.temperature, pad_id, heads,
        params.relations.heads,
    )  # fmt: skip


def what_to_record(params: DistillParams, teacher_layers: int) -> Recorded:
    """Say what of the teacher's layers the loss needs.

    Raises:
        UserError: if the teacher has no such layer.
    """
    weights, layer = params.weights, params.relations.layer
    if weights.relations and layer >= teacher_layers:
        raise UserError(f"distill.relations.layer: the teacher has layers 0 to {teacher_layers - 1}, got {layer}")
    matched = tuple(matched_layers(params.student, teacher_layers))
    return Recorded(
        hidden=matched if weights.hidden else (),
        attention=matched if weights.attention else (),
        relations=layer if weights.relations else None,
    )


def matched_layers(student: StudentParams, teacher_layers: int) -> list[int]:
    """Teacher layer whose output each student layer learns: its own, or the last of an even share (1909.10351)."""
    if student.kind == "layers":
        return student.layers
    count = student.layers if student.kind == "narrow" else layer_count(Path(student.path))
    return [math.ceil((index + 1) * teacher_layers / count) - 1 for index in range(count)]


def check_teacher(folder: Path, labels: Sequence[str], name: str) -> None:
    """Check that a further teacher answers with the labels of the data, in their order.

    Raises:
        UserError: if it does not, or its folder was altered.
    """
    try:
        verify(folder)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    own = labels_of(folder)
    if own != list(labels):
        raise UserError(f"{name}: {folder} knows the labels {own}, the data has {list(labels)}; fine-tune it on these")


def labels_of(checkpoint: Path) -> list[str]:
    """Names of the classes that a checkpoint knows, by index."""
    names: dict[int, str] = transformers.AutoConfig.from_pretrained(checkpoint).id2label
    return [names[index] for index in sorted(names)]


def check_same_tokenizer(checkpoint: Path, tokenizer: Path, name: str) -> None:
    """Check that a checkpoint comes with the very tokenizer of the data.

    Raises:
        UserError: if it does not, or is no checkpoint.
    """
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{name}: {checkpoint} has no config.json; name the folder of a checkpoint")
    try:
        own = _encoding(checkpoint)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: {checkpoint} has no tokenizer that can be loaded: {reason}") from None
    if own != _encoding(tokenizer):
        raise UserError(f"{name}: {checkpoint} has another tokenizer than the data; take one with the same")


def lesson_batch(lesson: Lesson, batch: Batch) -> Tensors:
    """Texts of a batch, what is known of them, and their places in the lesson."""
    examples, places = lesson.examples, torch.tensor(list(batch))
    return {
        **pad_tensors([examples.input_ids[i] for i in batch], lesson.pad_id),
        "labels": torch.from_numpy(examples.labels[list(batch)]),
        "teacher_logits": lesson.teacher.logits[places],
        "places": places,
    }


def student_loss(student: nn.Module, task: Task, lesson: Lesson, layers: Sequence[int], tensors: Tensors) -> Tensor:
    """Weighted loss of a batch.

    Args:
        student: the model that learns.
        task: for the terms on logits.
        lesson: texts, teacher's outputs and weights.
        layers: student layers that are held against the recorded teacher layers, in the same order.
        tensors: of `lesson_batch`.
    """
    teacher, weights = lesson.teacher, lesson.weights
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    with recorded_projections(student, _layers_to_record(student, lesson, layers)) as seen:
        output = student(**inputs, output_hidden_states=bool(teacher.hidden))
    logits = output.logits.float()
    loss = weights.soft * task.soft_loss(logits, tensors["teacher_logits"], lesson.temperature)
    if weights.hard:
        labels = tensors["labels"]
        share = (labels >= 0).float().mean()  # a batch with few labels must not weigh them more
        loss = loss + weights.hard * share * task.loss(logits, labels)
    mask, tokens = inputs["attention_mask"].bool(), teacher.tokens(tensors["places"].cpu())
    for layer, hidden in zip(layers, teacher.hidden, strict=False):
        states = _projected(student, output.hidden_states[layer + 1][mask]).float()
        wanted = hidden[tokens].to(states.device).float()
        loss = loss + weights.hidden / len(layers) * (states - wanted).square().mean()
    for layer, pair, heads in zip(layers, teacher.attention, lesson.attention_heads, strict=False):
        query, key = _padded(pair[tokens], mask).unbind(dim=2)
        term = relation_loss((seen[layer][0], seen[layer][1]), (query, key), heads, mask)
        loss = loss + weights.attention / len(layers) * term
    if teacher.relations is not None:
        parts = zip(seen[_last_layer(student)], _padded(teacher.relations[tokens], mask).unbind(dim=2), strict=True)
        terms = [relation_loss((own, own), (other, other), lesson.relation_heads, mask) for own, other in parts]
        loss = loss + weights.relations * torch.stack(terms).mean()
    return loss


def _layers_to_record(student: nn.Module, lesson: Lesson, layers: Sequence[int]) -> list[int]:
    attentive = list(layers) if lesson.teacher.attention else []
    return sorted({*attentive, *([] if lesson.teacher.relations is None else [_last_layer(student)])})


def _last_layer(student: nn.Module) -> int:
    return len(encoder_layers(student)) - 1


def teach(
    student: nn.Module,
    task: Task,
    lesson: Lesson,
    layers: Sequence[int],
    validation: Examples,
    optimizer: OptimizerParams,
    epochs: int,
    run: StageRun,
    phase: str,
) -> Position:
    """Train a student, with a learnt projection of its hidden states where it is narrower; see `student_loss`."""
    with _projection(student, lesson), _frozen_word_embeddings(student, run.params.distill.freeze_word_embeddings):
        recipe = distillation_recipe(student, task, lesson, layers, validation, optimizer, epochs, run)
        return train(student, recipe, run, phase)


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
    """Describe the training of a student; see `student_loss`. `teach` does it.

    Raises:
        UserError: if a term of the loss cannot be computed for this student.
    """
    check_comparable(student, lesson, layers)
    lengths = [len(row) for row in lesson.examples.input_ids]
    metric, seed = run.params.quality.metric, run.params.seed
    return Recipe(
        optimizer=optimizer,
        rounds=epochs,
        batches=lambda epoch: shuffled_batches(lengths, optimizer.batch_tokens, seed * 1000 + epoch),
        prepare=lambda batch: lesson_batch(lesson, batch),
        loss=lambda tensors: student_loss(student, task, lesson, layers, tensors),
        evaluate=lambda: judge(student, task, metric, validation, lesson.pad_id),
        tokens={lesson.pad_id, *(token for row in lesson.examples.input_ids for token in row)},
    )


def check_comparable(student: nn.Module, lesson: Lesson, layers: Sequence[int]) -> None:
    """Check that what the loss compares can be compared.

    Raises:
        UserError: if head counts differ, relation heads do not divide a width, or hidden widths differ.
    """
    teacher, off = lesson.teacher, "set it to 0"
    if teacher.hidden and layers and hidden_width(student) != teacher.hidden[0].shape[-1] and not _has(student):
        raise UserError(
            f"distill.weights.hidden: the student is {hidden_width(student)} wide and the teacher "
            f"{teacher.hidden[0].shape[-1]}; {off}"
        )
    if teacher.attention:
        own = layer_widths(student)
        for layer, heads in zip(layers, lesson.attention_heads, strict=False):
            if own[layer].heads != heads:
                raise UserError(
                    f"distill.weights.attention: layer {layer} of the student has {own[layer].heads} heads where the "
                    f"teacher has {heads}; {off}, distill.weights.relations needs no equal heads"
                )
    if teacher.relations is not None:
        own_width = attention_linears(encoder_layers(student)[-1])[0].out_features
        for whose, width in (("student", own_width), ("teacher", teacher.relations.shape[-1])):
            if width % lesson.relation_heads:
                raise UserError(
                    f"distill.relations.heads: {lesson.relation_heads} does not divide the {width} features of the "
                    f"{whose}'s attention; take a divisor of them"
                )


@contextmanager
def _projection(student: nn.Module, lesson: Lesson) -> Iterator[None]:
    """Give the student a part that maps its hidden states to the teacher's width; only training sees it."""
    hidden = lesson.teacher.hidden
    needed = bool(hidden) and hidden[0].shape[-1] != hidden_width(student)
    if needed:
        student.add_module(_PROJECTION, nn.Linear(hidden_width(student), hidden[0].shape[-1], bias=False))
    try:
        yield
    finally:
        if needed:
            delattr(student, _PROJECTION)


@contextmanager
def _frozen_word_embeddings(student: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep the word embeddings out of the training."""
    owner: Any = student
    weight = owner.get_input_embeddings().weight
    weight.requires_grad_(not wanted)
    try:
        yield
    finally:
        weight.requires_grad_(True)


def _projected(student: nn.Module, states: Tensor) -> Tensor:
    projected: Tensor = getattr(student, _PROJECTION)(states) if _has(student) else states
    return projected


def _has(student: nn.Module) -> bool:
    return hasattr(student, _PROJECTION)


def _padded(tokens: Tensor, mask: Tensor) -> Tensor:
    """Lay tokens that lie end to end out as texts: [tokens, ...] to [texts, length, ...]."""
    padded = torch.zeros(*mask.shape, *tokens.shape[1:], device=mask.device)
    padded[mask] = tokens.to(mask.device).float()
    return padded


def layer_count(checkpoint: Path) -> int:
    """Count the encoder layers of a checkpoint."""
    return int(transformers.AutoConfig.from_pretrained(checkpoint).num_hidden_layers)


def _encoding(folder: Path) -> dict[str, Any]:
    """All that decides how a tokenizer encodes; where it cuts and what it pads is up to the caller."""
    described: dict[str, Any] = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    return {name: value for name, value in described.items() if name not in ("truncation", "padding")}

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch
import yaml
from torch import Tensor, nn

from stages.core import distillation
from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model, load_tokenizer
from stages.core.distillation import (
    Lesson,
    add_transfer_texts,
    build_lesson,
    check_comparable,
    lesson_batch,
    matched_layers,
    student_loss,
)
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.params import (
    AugmentationParams,
    DistillParams,
    DistillWeights,
    LayersStudent,
    NarrowStudent,
    NoiseParams,
    TransferParams,
)
from stages.core.structure import encoder_layers, keep_layers, keep_parts
from stages.core.tasks import Task, get_task
from stages.core.teacher import Recorded, teacher_outputs

TASK = get_task("text-classification")
NONE = {"soft": 0.0, "hard": 0.0, "hidden": 0.0, "attention": 0.0, "relations": 0.0}
DEFAULT = yaml.safe_load((Path(__file__).parents[3] / "params.yaml").read_text())["distill"]
NO_NOISE = NoiseParams(copies=0, mask_probability=0.1, replace_probability=0.1, cut_probability=0.25)
NO_AUGMENTATION = AugmentationParams(copies=0, mask_probability=0.15, candidates=5)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _lesson(teacher: Path, data: Path, relation_heads: int = 8, **weights: float) -> Lesson:
    examples, record = load_examples(data, "train"), DistillWeights(**{**NONE, "soft": 1e-9, **weights})
    recorded = Recorded(
        hidden=(0, 1) if record.hidden else (),
        attention=(0, 1) if record.attention else (),
        relations=1 if record.relations else None,
    )
    outputs = teacher_outputs(teacher, examples.input_ids, recorded, "fp32")
    return Lesson(examples, outputs, record, 2.0, 0, [4] * len(recorded.attention), relation_heads)


def _loss(student: nn.Module, task: Task, lesson: Lesson, layers: list[int], batch: list[int]) -> Tensor:
    return student_loss(student, task, lesson, layers, lesson_batch(lesson, batch))


def _params(**changes: Any) -> DistillParams:
    raw = copy.deepcopy(DEFAULT)
    raw["student"] = {"kind": "layers", "layers": [0, 1]}
    raw["relations"] = {"layer": 1, "heads": 4}
    raw["optimizer"]["precision"] = "fp32"
    raw["transfer"]["texts"] = raw["transfer"]["noise"]["copies"] = 0
    raw["weights"] = {**NONE, "soft": 1.0}
    return DistillParams.model_validate({**raw, **changes})


def _copy(checkpoint: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("term", ["soft", "hidden", "attention", "relations"])
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(term: str, tiny_checkpoint: Path, tiny_data: Path) -> None:
    lesson = _lesson(tiny_checkpoint, tiny_data, **{term: 1.0})
    loss = _loss(load_model(tiny_checkpoint), TASK, lesson, [0, 1], list(range(10)))
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("term", "touched"), [("hidden", (0, 1)), ("attention", (0, 1)), ("relations", (0, 1))])
def test_every_term_reaches_the_layers_it_is_about(
    term: str, touched: tuple[int, ...], tiny_checkpoint: Path, tiny_data: Path
) -> None:
    lesson, student = _lesson(tiny_checkpoint, tiny_data, **{term: 1.0}), load_model(tiny_checkpoint)
    with torch.no_grad():
        for layer in encoder_layers(student):
            layer.attention.self.query.weight.mul_(-0.5)
    loss = _loss(student, TASK, lesson, [0, 1], list(range(10)))
    loss.backward()
    assert loss.item() > 1e-4
    for index in touched:
        gradient = encoder_layers(student)[index].attention.self.query.weight.grad
        assert gradient.abs().sum() > 0


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_checkpoint: Path, tiny_data: Path) -> None:
    student = load_model(tiny_checkpoint)
    with torch.no_grad():
        for part in student.parameters():
            part.mul_(0.8)
    weights = {"soft": 0.7, "hard": 0.2, "hidden": 0.3, "attention": 0.5, "relations": 1.5}

    def loss(**chosen: float) -> float:
        lesson = _lesson(tiny_checkpoint, tiny_data, **chosen)
        return _loss(student, TASK, lesson, [0, 1], list(range(20))).item()

    alone = [weight * loss(**{name: 1.0}) for name, weight in weights.items()]
    assert min(alone) > 1e-4
    assert loss(**weights) == pytest.approx(sum(alone), rel=1e-3)


def test_terms_of_weight_zero_listen_to_nothing(
    tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listened: list[list[int]] = []
    record = distillation.recorded_projections
    monkeypatch.setattr(
        distillation, "recorded_projections", lambda model, layers: (listened.append(layers), record(model, layers))[1]
    )
    student = load_model(tiny_checkpoint)
    _loss(student, TASK, _lesson(tiny_checkpoint, tiny_data, hidden=1.0), [0, 1], [0])
    _loss(student, TASK, _lesson(tiny_checkpoint, tiny_data, relations=1.0), [0, 1], [0])
    _loss(student, TASK, _lesson(tiny_checkpoint, tiny_data, attention=1.0), [0, 1], [0])
    assert listened == [[], [1], [0, 1]]


def test_a_pruned_student_learns_relations_but_not_attention(tiny_checkpoint: Path, tiny_data: Path) -> None:
    student = load_model(tiny_checkpoint)
    for layer in encoder_layers(student):
        keep_parts(layer, torch.tensor([0, 2, 3]), torch.arange(64))
    lesson = _lesson(tiny_checkpoint, tiny_data, relations=1.0)
    check_comparable(student, lesson, [0, 1])
    loss = _loss(student, TASK, lesson, [0, 1], list(range(10)))
    loss.backward()
    assert encoder_layers(student)[1].attention.self.value.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="layer 0 of the student has 3 heads where the teacher has 4; set it to 0"):
        check_comparable(student, _lesson(tiny_checkpoint, tiny_data, attention=1.0), [0, 1])
    lesson = _lesson(tiny_checkpoint, tiny_data, relation_heads=16, relations=1.0)
    with pytest.raises(UserError, match=r"relations.heads: 16 does not divide the 24 features of the student"):
        check_comparable(student, lesson, [0, 1])


def test_relations_come_from_the_last_layer_of_a_shallower_student(tiny_checkpoint: Path, tiny_data: Path) -> None:
    student = load_model(tiny_checkpoint)
    keep_layers(student, [0])
    loss = _loss(student, TASK, _lesson(tiny_checkpoint, tiny_data, relations=1.0), [], list(range(10)))
    loss.backward()
    assert encoder_layers(student)[0].attention.self.key.weight.grad.abs().sum() > 0


def test_hard_labels_count_by_the_share_of_labelled_texts(tiny_checkpoint: Path, tiny_data: Path) -> None:
    student = load_model(tiny_checkpoint)
    lesson = _lesson(tiny_checkpoint, tiny_data, hard=1.0)
    whole = _loss(student, TASK, lesson, [], [0, 1]).item()
    lesson.examples.labels[1] = -1
    first = _loss(student, TASK, lesson, [], [0]).item()
    half = _loss(student, TASK, lesson, [], [0, 1]).item()
    assert half == pytest.approx(first / 2, rel=1e-4)
    assert whole != pytest.approx(half, rel=1e-4)


def test_transfer_texts_match_the_pattern_and_have_no_label(tiny_data: Path, tmp_path: Path) -> None:
    texts = ["where is the cat ?", "a dog", "who is in london ?", "how many ?"]
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "corpus.parquet")
    examples, tokenizer = load_examples(tiny_data, "train"), load_tokenizer(tiny_data / "tokenizer")
    two = TransferParams(texts=2, pattern=r"\?$", noise=NO_NOISE, augmentation=NO_AUGMENTATION)
    none = TransferParams(texts=0, pattern=".", noise=NO_NOISE, augmentation=NO_AUGMENTATION)
    joined = add_transfer_texts(examples, tmp_path, two, tokenizer, 24, seed=0)
    assert len(joined) == len(examples) + 2
    assert set(joined.texts[-2:]) < {texts[0], texts[2], texts[3]}
    assert numpy.array_equal(joined.labels[-2:], [-1, -1])
    assert joined.input_ids[-1] == tokenizer(joined.texts[-1])["input_ids"]
    assert add_transfer_texts(examples, tmp_path, none, tokenizer, 24, 0) is examples


def test_even_shares_of_the_teacher() -> None:
    def narrow(layers: int) -> NarrowStudent:
        return NarrowStudent(kind="narrow", layers=layers, hidden=8, heads=2, neurons=16)

    assert matched_layers(narrow(2), 6) == [2, 5]
    assert matched_layers(narrow(3), 6) == [1, 3, 5]
    assert matched_layers(narrow(4), 6) == [1, 2, 4, 5]
    assert matched_layers(narrow(6), 6) == list(range(6))
    assert matched_layers(LayersStudent(kind="layers", layers=[0, 4]), 6) == [0, 4]


def test_a_lesson_records_what_the_weights_ask_for(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    every = _params(weights={**NONE, "soft": 1.0, "hidden": 1.0, "attention": 1.0, "relations": 1.0})
    lesson = build_lesson(every, tiny_checkpoint, tiny_data, tmp_path, 0)
    assert (len(lesson.teacher.hidden), lesson.layers, lesson.attention_heads) == (2, 2, [4, 4])
    assert lesson.teacher.relations is not None
    plain = build_lesson(_params(), tiny_checkpoint, tiny_data, tmp_path, 0)
    assert (plain.teacher.hidden, plain.teacher.relations, plain.layers) == ([], None, 0)
    with pytest.raises(UserError, match=r"distill.relations.layer: the teacher has layers 0 to 1, got 2"):
        build_lesson(
            every.model_copy(update={"relations": every.relations.model_copy(update={"layer": 2})}),
            tiny_checkpoint, tiny_data, tmp_path, 0,
        )  # fmt: skip


def test_further_teachers_are_averaged_in(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = load_model(tiny_checkpoint)
    with torch.no_grad():
        for part in other.parameters():
            part.mul_(0.9)
    folder = tmp_path / "second"
    shutil.copytree(tiny_checkpoint, folder)
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in other.state_dict().items()}, folder / "model.safetensors")
    write_manifest(folder)
    weights = {**NONE, "soft": 1.0, "hidden": 1.0}
    both = build_lesson(_params(teachers=[str(folder)], weights=weights), tiny_checkpoint, tiny_data, tmp_path, 0)
    alone = build_lesson(_params(weights=weights), tiny_checkpoint, tiny_data, tmp_path, 0)
    rows = load_examples(tiny_data, "train").input_ids
    second = teacher_outputs(folder, rows, Recorded(), "fp32").logits
    expected = ((alone.teacher.logits / 2).softmax(dim=-1) + (second / 2).softmax(dim=-1)) / 2
    torch.testing.assert_close((both.teacher.logits / 2).softmax(dim=-1), expected)
    assert not torch.allclose(both.teacher.logits.softmax(dim=-1), alone.teacher.logits.softmax(dim=-1), atol=1e-3)
    assert torch.equal(both.teacher.hidden[0], alone.teacher.hidden[0])


def test_teachers_that_do_not_fit_are_refused(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    labels = _copy(tiny_checkpoint, tmp_path / "labels", id2label={"0": "number", "1": "animal", "2": "place"})
    tokenizer = _copy(tiny_checkpoint, tmp_path / "words")
    words = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(words.replace('"london"', '"berlin"'))
    write_manifest(tokenizer)
    altered = _copy(tiny_checkpoint, tmp_path / "altered")
    (altered / "headroom.json").write_text("{}")
    for path, message in (
        (labels, "distill.teachers[0]: labels knows the labels ['number', 'animal', 'place'], the data has ['animal',"),
        (tokenizer, "distill.teachers[0]: words has another tokenizer than the data"),
        (altered, "distill.teachers[0]: altered/headroom.json: has 2 bytes where"),
        (tmp_path / "nowhere", "distill.teachers[0]: nowhere has no config.json; name the folder of a checkpoint"),
    ):
        with pytest.raises(UserError) as caught:
            build_lesson(_params(teachers=[path.name]), tiny_checkpoint, tiny_data, tmp_path, 0)
        assert str(caught.value).startswith(message)


def test_augmented_texts_have_no_label_and_follow_the_rest(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [[2, 70, 71, 3], [2, 72, 3]]
    monkeypatch.setattr(distillation, "augmented_rows", lambda *arguments: made)
    transfer = TransferParams(
        texts=0,
        pattern=".",
        noise=NO_NOISE,
        augmentation=AugmentationParams(copies=1, mask_probability=0.3, candidates=5),
    )
    with_model = build_lesson(_params(transfer=transfer), tiny_checkpoint, tiny_data, tmp_path, 0, tmp_path)
    assert with_model.examples.input_ids[-2:] == made
    assert numpy.array_equal(with_model.examples.labels[-3:] < 0, [False, True, True])
    assert len(with_model.teacher.logits) == len(with_model.examples) == len(with_model.examples.texts)
    without = build_lesson(_params(transfer=transfer), tiny_checkpoint, tiny_data, tmp_path, 0)
    assert len(without.examples) == len(with_model.examples) - 2

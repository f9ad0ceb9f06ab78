from pathlib import Path

import numpy
import pandas
import pytest
import torch

from stages.core import distillation
from stages.core.checkpoints import load_model, load_tokenizer
from stages.core.distillation import Lesson, add_transfer_texts, student_loss, teacher_outputs
from stages.core.examples import load_examples
from stages.core.params import DistillWeights, TransferParams
from stages.core.tasks import get_task

TASK = get_task("text-classification")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _lesson(teacher: Path, data: Path, weights: DistillWeights) -> Lesson:
    examples = load_examples(data, "train")
    return Lesson(examples, teacher_outputs(teacher, examples, [0, 1], 0, "fp32"), weights, 2.0, 0)


def test_outputs_are_those_of_the_teacher_text_by_text(tiny_checkpoint: Path, tiny_data: Path) -> None:
    examples = load_examples(tiny_data, "train")
    outputs = teacher_outputs(tiny_checkpoint, examples, [1], 0, "fp32")
    teacher = load_model(tiny_checkpoint)
    for index in (0, 7, 59):
        row = torch.tensor([examples.input_ids[index]])
        with torch.no_grad():
            alone = teacher(input_ids=row, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        hidden = outputs.hidden[0][outputs.starts[index] : outputs.starts[index + 1]].float()
        torch.testing.assert_close(hidden, alone.hidden_states[2][0], atol=0.02, rtol=0.01)


def test_the_teacher_is_asked_once(tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = load_examples(tiny_data, "train")
    first = teacher_outputs(tiny_checkpoint, examples, [], 0, "fp32")

    def refuse(folder: Path) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(distillation, "load_model", refuse)
    assert torch.equal(teacher_outputs(tiny_checkpoint, examples, [], 0, "fp32").logits, first.logits)
    with pytest.raises(AssertionError, match="asked again"):
        teacher_outputs(tiny_checkpoint, examples.select(range(5)), [], 0, "fp32")


def test_asking_leaves_the_generator_as_it_was(tiny_checkpoint: Path, tiny_data: Path) -> None:
    before = torch.get_rng_state()
    teacher_outputs(tiny_checkpoint, load_examples(tiny_data, "train"), [], 0, "fp32")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_equal_to_the_teacher_has_nothing_to_learn(tiny_checkpoint: Path, tiny_data: Path) -> None:
    lesson = _lesson(tiny_checkpoint, tiny_data, DistillWeights(soft=1.0, hard=0.0, hidden=1.0))
    loss = student_loss(load_model(tiny_checkpoint), TASK, lesson, [0, 1], list(range(10)))
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


def test_hard_labels_count_by_the_share_of_labelled_texts(tiny_checkpoint: Path, tiny_data: Path) -> None:
    student = load_model(tiny_checkpoint)
    lesson = _lesson(tiny_checkpoint, tiny_data, DistillWeights(soft=0.0, hard=1.0, hidden=0.0))
    whole = student_loss(student, TASK, lesson, [], [0, 1]).item()
    lesson.examples.labels[1] = -1
    first = student_loss(student, TASK, lesson, [], [0]).item()
    half = student_loss(student, TASK, lesson, [], [0, 1]).item()
    assert half == pytest.approx(first / 2, rel=1e-4)
    assert whole != pytest.approx(half, rel=1e-4)


def test_transfer_texts_match_the_pattern_and_have_no_label(tiny_data: Path, tmp_path: Path) -> None:
    texts = ["where is the cat ?", "a dog", "who is in london ?", "how many ?"]
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "corpus.parquet")
    examples, tokenizer = load_examples(tiny_data, "train"), load_tokenizer(tiny_data / "tokenizer")
    joined = add_transfer_texts(examples, tmp_path, TransferParams(texts=2, pattern=r"\?$"), tokenizer, 24, seed=0)
    assert len(joined) == len(examples) + 2
    assert set(joined.texts[-2:]) < {texts[0], texts[2], texts[3]}
    assert numpy.array_equal(joined.labels[-2:], [-1, -1])
    assert joined.input_ids[-1] == tokenizer(joined.texts[-1])["input_ids"]
    assert add_transfer_texts(examples, tmp_path, TransferParams(texts=0, pattern="."), tokenizer, 24, 0) is examples

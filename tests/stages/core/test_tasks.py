from pathlib import Path

import numpy
import pytest
import torch

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.tasks import LossOptions, get_task

TASK = get_task("text-classification")


def test_loss_ignores_texts_without_a_label() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    labelled = TASK.loss(logits[:1], torch.tensor([0]))
    assert TASK.loss(logits, torch.tensor([0, -1, -1])) == labelled
    assert labelled.item() == pytest.approx(numpy.log(1 + numpy.exp(-2)))


def test_a_batch_without_labels_costs_nothing_and_still_has_a_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    TASK.loss(logits, torch.tensor([-1, -1]), LossOptions(smoothing=0.1)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0.0


def test_soft_loss_is_zero_for_equal_answers_and_worked_by_hand_otherwise() -> None:
    teacher = torch.tensor([[numpy.log(3.0), 0.0]], dtype=torch.float64)
    assert TASK.soft_loss(teacher, teacher, 2.0).item() == pytest.approx(0.0)
    student = torch.zeros(1, 2, dtype=torch.float64)
    wanted = 0.75 * numpy.log(0.75 / 0.5) + 0.25 * numpy.log(0.25 / 0.5)
    assert TASK.soft_loss(student, teacher, 1.0).item() == pytest.approx(wanted)


def test_score_by_name() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert TASK.score("accuracy", logits, numpy.array([0, 1])) == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "speecht5"}, "no text classifier of model_type speecht5"),
        ({"model_type": "gpt2"}, "config.json has no pad_token_id"),
    ],
)
def test_a_checkpoint_that_no_text_can_be_classified_with_is_refused(
    config: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=message):
        TASK.build_model(tmp_path, ["a", "b"])

"""Losses and mixtures against references."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional

from stages.core.checkpoints import load_model
from stages.core.params import BalancedClasses, EffectiveNumber
from stages.core.tasks import PLAIN, LossOptions, get_task
from stages.core.training.loop import split
from stages.finetune.losses import batch_loss, class_weights, symmetric_divergence
from stages.finetune.mixup import mixed_inputs, with_partners

TASK = get_task("text-classification")
LABELS = [0] * 50 + [1] * 9 + [2] * 3
BATCH = {
    "input_ids": torch.tensor([[2, 30, 31, 3], [2, 32, 3, 0], [2, 33, 34, 3]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
    "labels": torch.tensor([0, 2, 1]),
}


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    wanted = compute_class_weight("balanced", classes=numpy.arange(3), y=numpy.array(LABELS))
    found = class_weights(BalancedClasses(kind="balanced"), LABELS, 3)
    numpy.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert torch.equal(class_weights(BalancedClasses(kind="balanced"), [*LABELS, -1, -1], 3), found)


@pytest.mark.parametrize("kind", ["balanced", "effective_number"])
def test_a_training_text_weighs_one_in_the_mean_and_an_absent_class_nothing(kind: str) -> None:
    params = BalancedClasses(kind="balanced") if kind == "balanced" else EffectiveNumber(kind=kind, beta=0.9)
    found = class_weights(params, LABELS, 4)
    assert found[LABELS].mean().item() == pytest.approx(1.0)
    assert found[3] == 0.0
    assert found[2] > found[1] > found[0]


def test_effective_numbers_by_hand() -> None:
    found = class_weights(EffectiveNumber(kind="effective_number", beta=0.5), [0, 1, 1], 2)
    assert (found[0] / found[1]).item() == pytest.approx((1 - 0.5**2) / (1 - 0.5))


@pytest.mark.parametrize("beta", [1e-12, 1.0 - 1e-9])
def test_effective_numbers_go_from_all_alike_to_balanced(beta: float) -> None:
    found = class_weights(EffectiveNumber(kind="effective_number", beta=beta), LABELS, 3)
    wanted = torch.ones(3) if beta < 0.5 else class_weights(BalancedClasses(kind="balanced"), LABELS, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)


def test_without_options_the_loss_is_cross_entropy_bit_for_bit() -> None:
    logits, labels = torch.randn(20, 5), torch.randint(5, (20,))
    wanted = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(TASK.loss(logits, labels, LossOptions(smoothing=0.1, focal_gamma=0.0)), wanted)
    assert torch.equal(TASK.loss(logits, labels), TASK.loss(logits, labels, PLAIN))


def test_focal_loss_by_its_formula() -> None:
    logits, labels = torch.randn(20, 5, dtype=torch.float64), torch.randint(5, (20,))
    sure = logits.softmax(dim=-1)[torch.arange(20), labels]
    wanted = (-((1 - sure) ** 2) * sure.log()).mean()
    torch.testing.assert_close(TASK.loss(logits, labels, LossOptions(focal_gamma=2.0)), wanted)
    nearly_off = TASK.loss(logits, labels, LossOptions(focal_gamma=1e-9))
    torch.testing.assert_close(nearly_off, functional.cross_entropy(logits, labels))


def test_focal_loss_has_a_gradient_where_the_model_is_perfectly_sure() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    TASK.loss(logits, torch.tensor([0, 1]), LossOptions(focal_gamma=0.5)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_weights_count_by_class_and_texts_without_a_label_do_not() -> None:
    logits, labels, weights = torch.randn(4, 3), torch.tensor([0, 2, -1, 2]), torch.tensor([1.0, 5.0, 3.0])
    each = functional.cross_entropy(logits[[0, 1, 3]], labels[[0, 1, 3]], reduction="none")
    wanted = (each * torch.tensor([1.0, 3.0, 3.0])).sum() / 3
    torch.testing.assert_close(TASK.loss(logits, labels, LossOptions(class_weights=weights)), wanted)


def test_a_batch_cut_into_parts_has_the_loss_of_the_whole() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 2, 0, 0])
    options = LossOptions(0.1, 1.5, torch.tensor([0.5, 2.0, 3.0]))
    parts = [TASK.loss(logits[at : at + 2], labels[at : at + 2], options) for at in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), TASK.loss(logits, labels, options))


def test_the_divergence_is_the_mean_of_both_directions() -> None:
    first, second = torch.randn(7, 4), torch.randn(7, 4)
    one, other = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    there = functional.kl_div(one, other, log_target=True, reduction="batchmean")
    back = functional.kl_div(other, one, log_target=True, reduction="batchmean")
    torch.testing.assert_close(symmetric_divergence(first, second), (there + back) / 2)
    assert symmetric_divergence(first, first) == 0.0


class Answering(nn.Module):
    """A model that answers with what it was given, one answer after the other."""

    def __init__(self, *answers: Tensor):
        super().__init__()
        self.answers, self.seen = torch.cat(answers), list[int]()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.seen.append(len(input_ids))
        return SimpleNamespace(logits=self.answers)


def test_r_drop_is_half_of_the_papers_loss_in_one_pass_of_twice_the_size() -> None:
    first, second = torch.randn(3, 3), torch.randn(3, 3)
    model = Answering(first, second)
    found = batch_loss(model, TASK, PLAIN, 0.7, BATCH)
    labels = BATCH["labels"]
    paper = functional.cross_entropy(first, labels) + functional.cross_entropy(second, labels)
    paper = paper + 0.7 * symmetric_divergence(first, second)  # alpha / 2 times the sum of both directions
    torch.testing.assert_close(found, paper / 2)
    assert model.seen == [6]


def test_the_two_passes_differ_by_dropout_and_by_nothing_else(tiny_checkpoint: Path) -> None:
    model: Any = load_model(tiny_checkpoint)
    once = batch_loss(model, TASK, PLAIN, 0.0, BATCH)
    torch.testing.assert_close(batch_loss(model, TASK, PLAIN, 5.0, BATCH), once)
    model.train()
    torch.manual_seed(0)
    weak = batch_loss(model, TASK, PLAIN, 1.0, BATCH)
    torch.manual_seed(0)
    assert batch_loss(model, TASK, PLAIN, 5.0, BATCH) > weak


def test_partners_depend_on_the_batch_alone() -> None:
    mixed = with_partners(BATCH, 0.4, (17, 5, 6, 7))
    again = with_partners(BATCH, 0.4, (17, 5, 6, 7))
    assert all(torch.equal(mixed[name], again[name]) for name in mixed)
    shares = [float(with_partners(BATCH, 0.4, (17, index))["share"][0]) for index in range(400)]
    assert numpy.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert numpy.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.15)  # of Beta(0.4, 0.4)


def test_mixed_embeddings_by_hand() -> None:
    embeddings = nn.Embedding(40, 2)
    tensors = {
        **BATCH,
        "partner_ids": BATCH["input_ids"][[1, 0, 2]],
        "partner_mask": BATCH["attention_mask"][[1, 0, 2]],
        "partner_labels": BATCH["labels"][[1, 0, 2]],
        "share": torch.full((3,), 0.3),
    }
    found = mixed_inputs(embeddings, tensors)
    weight = embeddings.weight
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1]] * 3
    torch.testing.assert_close(found["inputs_embeds"][0, 2], 0.3 * weight[31] + 0.7 * weight[3])
    torch.testing.assert_close(found["inputs_embeds"][0, 3], 0.3 * weight[3])  # the partner ends before
    torch.testing.assert_close(found["inputs_embeds"][1, 3], 0.7 * weight[3])


def test_mixup_mixes_losses_too_and_whole_texts_stay_what_they_are(tiny_checkpoint: Path) -> None:
    model: Any = load_model(tiny_checkpoint)
    plain = batch_loss(model, TASK, PLAIN, 0.0, BATCH)
    mixed = dict(with_partners(BATCH, 0.4, (1,)))
    mixed["share"] = torch.ones(3)
    mixed["partner_mask"] = BATCH["attention_mask"]
    torch.testing.assert_close(batch_loss(model, TASK, PLAIN, 0.0, mixed), plain)
    mixed = dict(with_partners(BATCH, 0.4, (1,)))
    logits = model(**mixed_inputs(model.get_input_embeddings(), mixed)).logits
    share = mixed["share"][0]
    wanted = share * functional.cross_entropy(logits, mixed["labels"])
    wanted = wanted + (1 - share) * functional.cross_entropy(logits, mixed["partner_labels"])
    torch.testing.assert_close(batch_loss(model, TASK, PLAIN, 0.0, mixed), wanted)


def test_a_mixed_batch_can_be_cut_into_parts(tiny_checkpoint: Path) -> None:
    model: Any = load_model(tiny_checkpoint)
    mixed = with_partners(BATCH, 0.4, (2,))
    parts = [batch_loss(model, TASK, PLAIN, 0.0, part) for part in split(mixed, 3)]
    torch.testing.assert_close(torch.stack(parts).mean(), batch_loss(model, TASK, PLAIN, 0.0, mixed))

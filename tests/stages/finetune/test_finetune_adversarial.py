"""FGM and FreeLB against their definitions, written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core.checkpoints import load_model
from stages.core.errors import UserError
from stages.core.params import FastGradient, FreeAdversary
from stages.finetune.adversarial import build_adversary, climbed, fast_gradient, free_adversary, moved, start

PAD = 0
IDS = torch.tensor([[3, 4, 5], [6, 7, PAD]])
LABELS = torch.tensor([0, 1])
FREE = FreeAdversary(kind="freelb", steps=3, step_size=0.4, epsilon=0.7)


class Linear(nn.Module):
    """Sums embeddings over a text and answers linearly, with dropout of the embeddings between."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(8, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 2, bias=False)
        self.masks: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.words(ids)
        dropped = self.dropout(embedded)
        self.masks.append(dropped == 0)
        logits: Tensor = self.head((dropped * (ids != PAD)[:, :, None]).sum(dim=1))
        return logits


def backward_of(model: Linear, losses: list[float], ids: Tensor = IDS, labels: Tensor = LABELS) -> Any:
    def backward(share: float) -> float:
        loss = functional.cross_entropy(model(ids), labels) * share
        loss.backward()
        losses.append(loss.item())
        return loss.item()

    return backward


def test_the_move_has_the_asked_length_and_leaves_no_bit_behind() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    before, direction = weight.detach().clone(), torch.randn(5, 3)
    with moved(weight, direction, 0.3):
        torch.testing.assert_close(weight - before, 0.3 * direction / direction.norm())
    assert torch.equal(weight, before)


def test_fgm_adds_the_gradients_where_the_loss_is_larger() -> None:
    model, wanted = Linear(), Linear()
    losses: list[float] = []
    loss = fast_gradient(model.words.weight, 0.5, backward_of(model, losses))
    assert loss == losses[0] < losses[1]
    clean = torch.autograd.grad(functional.cross_entropy(wanted(IDS), LABELS), list(wanted.parameters()))
    with torch.no_grad():
        wanted.words.weight += 0.5 * clean[0] / clean[0].norm()
    attacked = torch.autograd.grad(functional.cross_entropy(wanted(IDS), LABELS), list(wanted.parameters()))
    for parameter, one, other in zip(model.parameters(), clean, attacked, strict=True):
        torch.testing.assert_close(parameter.grad, one + other)


def test_fgm_moves_along_the_gradient_of_its_own_part_of_a_batch() -> None:
    alone, second = Linear(), Linear()
    parts = [(IDS[:1], LABELS[:1]), (IDS[1:], LABELS[1:])]
    losses: list[float] = []
    fast_gradient(alone.words.weight, 0.5, backward_of(alone, losses, *parts[1]))
    fast_gradient(second.words.weight, 0.5, backward_of(second, [], *parts[0]))
    later: list[float] = []
    fast_gradient(second.words.weight, 0.5, backward_of(second, later, *parts[1]))
    assert later == pytest.approx(losses)


def algorithm_1(model: Linear, delta: Tensor, params: FreeAdversary) -> tuple[list[Tensor], float]:
    """FreeLB as the paper writes it, on embeddings: mean of the gradients of K steps, and the mean loss."""
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    total = 0.0
    for _ in range(params.steps):
        delta = delta.detach().requires_grad_()
        embedded = (model.words(IDS) + delta) * (IDS != PAD)[:, :, None]
        loss = functional.cross_entropy(model.head(embedded.sum(dim=1)), LABELS)
        *own, uphill = torch.autograd.grad(loss, [*model.parameters(), delta])
        gradients = [sum_ + gradient / params.steps for sum_, gradient in zip(gradients, own, strict=True)]
        total += loss.item() / params.steps
        moves = []
        for text in range(len(IDS)):
            step = delta[text].detach() + params.step_size * uphill[text] / uphill[text].norm()
            moves.append(step * min(1.0, params.epsilon / float(step.norm())))
        delta = torch.stack(moves)
    return gradients, total


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_freelb_is_the_algorithm_of_the_paper(steps: int) -> None:
    params = FREE.model_copy(update={"steps": steps})
    model, losses = Linear(), list[float]()
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(11)
    loss = free_adversary(model.words, params, PAD, backward_of(model, losses))
    gradients, wanted = algorithm_1(Linear(), start(IDS != PAD, 4, params.epsilon, seed), params)
    assert len(losses) == steps
    assert loss == pytest.approx(wanted)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert not model.words._forward_hooks


def test_the_start_is_even_within_its_bounds_and_zero_on_padding() -> None:
    tokens = torch.ones(2, 500, dtype=torch.bool)
    tokens[1, 100:] = False
    drawn = start(tokens, 20, epsilon=0.6, seed=1)
    assert drawn[1, 100:].abs().sum() == 0.0
    for text, count in ((0, 500), (1, 100)):
        values = drawn[text, :count] * (count * 20) ** 0.5
        assert values.abs().max() <= 0.6
        assert values.std() == pytest.approx(0.6 / 3**0.5, rel=0.05)  # of an even draw
        assert drawn[text].norm() < 0.6
    assert torch.equal(drawn, start(tokens, 20, epsilon=0.6, seed=1))
    assert not torch.equal(drawn, start(tokens, 20, epsilon=0.6, seed=2))


def test_a_step_stays_in_the_ball_of_each_text() -> None:
    delta, gradient = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    gradient[1], gradient[2] = 100.0, 0.0
    after = climbed(delta, gradient, step_size=0.5, epsilon=0.3)
    torch.testing.assert_close(after[:2], torch.full((2, 2, 2), 0.15))
    assert after[2].abs().sum() == 0.0
    torch.testing.assert_close(climbed(delta, gradient, 0.1, 0.3)[:2], torch.full((2, 2, 2), 0.05))


def test_all_steps_see_the_same_dropout_and_the_next_batch_another() -> None:
    model = Linear(dropout=0.5)
    free_adversary(model.words, FREE, PAD, backward_of(model, []))
    free_adversary(model.words, FREE, PAD, backward_of(model, []))
    first, second = model.masks[:3], model.masks[3:]
    assert all(torch.equal(mask, first[0]) for mask in first)
    assert all(torch.equal(mask, second[0]) for mask in second)
    assert not torch.equal(first[0], second[0])


def test_the_hook_reaches_the_embeddings_of_a_real_model(tiny_checkpoint: Path) -> None:
    model: Any = load_model(tiny_checkpoint)
    adversary: Callable[..., float] | None = build_adversary(model, FREE, PAD)
    losses: list[float] = []

    def backward(share: float) -> float:
        loss = functional.cross_entropy(model(input_ids=IDS, attention_mask=(IDS != PAD).long()).logits, LABELS)
        (loss * share).backward()
        losses.append(loss.item())
        return loss.item() * share

    assert adversary is not None
    assert adversary(backward) == pytest.approx(sum(losses) / 3)
    assert losses[0] < losses[1] < losses[2]


def test_models_that_an_adversary_cannot_work_on_are_refused(tiny_checkpoint: Path) -> None:
    model: Any = load_model(tiny_checkpoint)
    assert build_adversary(model, None, PAD) is None
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(UserError, match="take freelb"):
        build_adversary(model, FastGradient(kind="fgm", epsilon=1.0), PAD)
    assert build_adversary(model, FREE, PAD) is not None
    model.config = SimpleNamespace(model_type="xlnet")
    with pytest.raises(UserError, match="take fgm"):
        build_adversary(model, FREE, PAD)

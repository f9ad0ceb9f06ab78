import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.core.checkpoints import load_model
from stages.core.relations import recorded_projections, relation_loss
from stages.core.structure import encoder_layers

WHOLE = torch.ones(2, 5, dtype=torch.bool)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_identical_projections_have_nothing_to_learn() -> None:
    one, other = _random(0, 2, 5, 8), _random(1, 2, 5, 8)
    assert relation_loss((one, other), (one, other), 4, WHOLE).item() == pytest.approx(0.0, abs=1e-6)
    assert relation_loss((one, one), (other, other), 4, WHOLE).item() > 0.01


def test_a_case_solved_by_hand() -> None:
    """Two tokens of one feature: the student's products are 0, so its relations are even; the teacher's are not."""
    teacher, student = torch.tensor([[[1.0], [-1.0]]]), torch.zeros(1, 2, 1)
    sure = math.e / (math.e + 1 / math.e)
    expected = sure * math.log(sure / 0.5) + (1 - sure) * math.log((1 - sure) / 0.5)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert relation_loss((student, student), (teacher, teacher), 1, mask).item() == pytest.approx(expected, rel=1e-5)


def test_products_are_scaled_by_the_size_of_a_relation_head() -> None:
    """Features repeated n times give products n times as large; only a scale of 1 / sqrt(n) is left after scaling."""
    narrow = _random(2, 2, 5, 1)
    wide = narrow.repeat(1, 1, 4)
    mask = WHOLE
    same = relation_loss((wide, wide), (narrow * 2**0.5, narrow * 2**0.5), 1, mask)
    assert same.item() == pytest.approx(0.0, abs=1e-6)


def test_neither_widths_nor_heads_need_be_equal() -> None:
    student, teacher = _random(0, 2, 5, 8).requires_grad_(), _random(1, 2, 5, 12)
    loss = relation_loss((student, student), (teacher, teacher), 4, WHOLE)
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0


def test_following_the_gradient_brings_the_relations_together() -> None:
    teacher, student = _random(1, 2, 5, 12), _random(0, 2, 5, 8).requires_grad_()
    optimizer, losses = torch.optim.Adam([student], lr=0.05), []
    for _ in range(200):
        loss = relation_loss((student, student), (teacher, teacher), 2, WHOLE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_padding_never_counts() -> None:
    student, teacher = _random(0, 3, 4, 8), _random(1, 3, 4, 12)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    short = relation_loss((student, student), (teacher, teacher), 2, mask)
    alone = [
        relation_loss((s[None, :n],) * 2, (t[None, :n],) * 2, 2, torch.ones(1, n, dtype=torch.bool)) * n
        for s, t, n in zip(student, teacher, (4, 2, 1), strict=True)
    ]
    assert short.item() == pytest.approx(sum(term.item() for term in alone) / 7, rel=1e-5)
    noise = [torch.cat([tensor, _random(9, 3, 3, tensor.shape[2]) * 50], dim=1) for tensor in (student, teacher)]
    noise[0].requires_grad_()
    longer = torch.cat([mask, torch.zeros(3, 3, dtype=torch.bool)], dim=1)
    padded = relation_loss((noise[0],) * 2, (noise[1],) * 2, 2, longer)
    padded.backward()
    assert padded.item() == pytest.approx(short.item(), rel=1e-5)
    assert noise[0].grad is not None
    assert noise[0].grad[~longer].abs().max() == 0.0


def test_queries_against_keys_give_the_attention_map_of_the_model(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    model.set_attn_implementation("eager")
    ids = torch.arange(5, 29).reshape(3, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad(), recorded_projections(model, [1]) as seen:
        attention = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[1]
    query, key, value = seen[1]
    assert value.shape == (3, 8, 32)
    even = torch.zeros_like(query)
    loss = relation_loss((even, even), (query, key), 4, mask.bool())
    lengths = mask.sum(dim=1)[:, None, None]
    divergence = (attention * (attention.clamp_min(1e-30).log() + lengths.log()[..., None])).sum(dim=-1)
    expected = (divergence * mask[:, None, :]).sum() / (mask.sum() * 4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_hooks_are_gone_afterwards_and_none_are_made_for_no_layers(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    with recorded_projections(model, []):
        assert not any(linear._forward_hooks for linear in linears)
    with recorded_projections(model, [0]):
        assert sum(len(linear._forward_hooks) for linear in linears) == 3
        assert encoder_layers(model)[0].attention.self.query._forward_hooks
    assert not any(linear._forward_hooks for linear in linears)

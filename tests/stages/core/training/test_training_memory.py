"""Training under a memory budget gives the gradients of training without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import training_problem
import transformers
from torch import nn

from stages.core.errors import UserError
from stages.core.params import TrainingParams
from stages.core.training.loop import train
from stages.core.training.memory import checkpointed, fitted_to_memory, saved_bytes
from stages.core.training.processors import quick_on_processors
from stages.core.training.recipe import Recipe

OPTIMIZER = training_problem.OPTIMIZER.model_copy(update={"batch_tokens": 256, "learning_rate": 0.01})


def _params(budget: int | None, checkpointing: Literal["auto"] | bool = "auto") -> TrainingParams:
    return training_problem.TRAINING.model_copy(
        update={"activation_checkpointing": checkpointing, "memory_budget_mb": budget}
    )


def _bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    return transformers.AutoModelForMaskedLM.from_config(config).train()


def _loss(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).view(4, 10)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def test_activations_computed_twice_give_the_same_gradients() -> None:
    found = []
    for twice in (False, True):
        model = _bert()
        with quick_on_processors(model), checkpointed(model, twice):
            torch.manual_seed(1)  # dropout must fall alike both times
            _loss(model).backward()
        found.append(torch.cat([part.grad.flatten() for part in model.parameters()]))
        assert not model.is_gradient_checkpointing
    assert torch.equal(*found)


def test_computing_twice_keeps_less() -> None:
    model = _bert()
    usual = saved_bytes(lambda: _loss(model))
    with checkpointed(model, True):
        assert saved_bytes(lambda: _loss(model)) < 0.7 * usual


def test_saved_bytes_as_worked_by_hand_and_without_drawing_numbers() -> None:
    values = torch.ones(1000, requires_grad=True)
    before = torch.get_rng_state()
    # exp keeps its result; the square keeps that same tensor, which counts once; dropout is drawn and undone
    assert saved_bytes(lambda: values.exp().square().sum()) == 4000
    saved_bytes(lambda: nn.functional.dropout(values, 0.5).sum())
    assert torch.equal(torch.get_rng_state(), before)


class _Model(nn.Module):
    """Weights of a mebibyte: with gradients and two moments, four."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2**18))


@pytest.mark.parametrize(("budget", "parts"), [(None, 1), (100, 1), (44, 1), (24, 2), (9, 8)])
def test_micro_batches_are_as_many_as_the_budget_needs(budget: int | None, parts: int) -> None:
    with fitted_to_memory(_Model(), _params(budget, False), 8, lambda parts: 40 * 2**20 // parts) as chosen:
        assert chosen == parts


def test_copies_that_a_run_keeps_count() -> None:
    for kept, wanted in ((0, 1), (1, 2)):
        with fitted_to_memory(_Model(), _params(44, False), 8, lambda parts: 40 * 2**20 // parts, kept) as parts:
            assert parts == wanted


def test_each_of_several_models_computes_twice() -> None:
    both = nn.ModuleList([_bert(), _bert()])
    with checkpointed(both, True):
        assert all(model.is_gradient_checkpointing for model in both)
    assert not any(model.is_gradient_checkpointing for model in both)


def test_micro_batches_come_before_computing_twice() -> None:
    model = _bert()
    seen: list[tuple[int, bool]] = []

    def needed(parts: int) -> int:
        seen.append((parts, model.is_gradient_checkpointing))
        return (10 if model.is_gradient_checkpointing else 40) * 2**20 // parts

    with fitted_to_memory(model, _params(4), 4, needed) as parts:
        assert parts == 4
        assert model.is_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    assert seen == [(1, False), (2, False), (4, False), (1, True), (2, True), (4, True)]


def test_what_cannot_fit_is_told() -> None:
    told = "memory_budget_mb: 9, weights and optimizer take 4 MB and the smallest micro-batch 10 MB"
    with (
        pytest.raises(UserError, match=told),
        fitted_to_memory(_Model(), _params(9, False), 4, lambda parts: 40 * 2**20 // parts),
    ):
        pass
    with (
        pytest.raises(UserError, match="cannot compute activations twice"),
        fitted_to_memory(_Model(), _params(None, True), 4, lambda parts: 0),
    ):
        pass


def _fit(state: Path, budget: int | None) -> tuple[int, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1))
    inputs = torch.randn(512, 64)
    recipe = Recipe(
        optimizer=OPTIMIZER,
        rounds=1,
        batches=lambda index: [range(256), range(256, 512)],
        prepare=lambda batch: {"inputs": inputs[list(batch)]},
        loss=lambda tensors: (model(tensors["inputs"]).squeeze(-1) - tensors["inputs"].sum(1)).square().mean(),
        evaluate=lambda: (0.0, {}),
    )
    run: Any = SimpleNamespace(
        name="test",
        state=state,
        params=SimpleNamespace(saves=training_problem.PARAMS.saves, training=_params(budget)),
        record=SimpleNamespace(log=lambda step, values: None),
        log=lambda step, **values: None,
        say=lambda message: None,
    )
    parts = train(model, recipe, run, "fit").parts
    return parts, torch.cat([part.detach().flatten() for part in model.parameters()])


def test_training_under_a_budget_ends_where_training_without_does(tmp_path: Path) -> None:
    found = [_fit(tmp_path / str(budget), budget) for budget in (None, 2)]
    # a good mebibyte of weights, gradients and moments; 256 rows keep 1024 values of tanh each, another one
    assert [parts for parts, _ in found] == [1, 2]
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)

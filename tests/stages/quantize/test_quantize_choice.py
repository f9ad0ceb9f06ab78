"""The gate, the search for layers to leave in float, and training with rounding simulated."""

from collections.abc import Sequence

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stages.core.params import GateParams
from stages.core.quantized import ActivationRange
from stages.quantize.gate import judge_recipe
from stages.quantize.search import answers_moved, fewest_in_float
from stages.quantize.train import FakeQuantizedLinear

LABELS = numpy.arange(200) % 4
RIGHT = torch.eye(4)[torch.from_numpy(LABELS)]


def _gate(loss: float) -> GateParams:
    return GateParams(tolerated_loss=loss, bootstrap_samples=500, confidence=0.95)


def _wrong_on(count: int) -> torch.Tensor:
    answers = torch.from_numpy(LABELS).clone()
    answers[:count] = (answers[:count] + 1) % 4
    return torch.eye(4)[answers]


@pytest.mark.parametrize(("tolerated", "passed"), [(0.009, False), (0.01, True), (0.02, True)])
def test_the_paired_loss_decides(tolerated: float, passed: bool) -> None:
    verdict = judge_recipe("accuracy", RIGHT, _wrong_on(2), LABELS, _gate(tolerated), 0)
    assert (verdict.loss, verdict.agreement) == (pytest.approx(0.01), 0.99)
    assert verdict.low <= verdict.loss <= verdict.high
    assert verdict.passed == passed


def test_a_gain_passes() -> None:
    verdict = judge_recipe("accuracy", _wrong_on(5), RIGHT, LABELS, _gate(0.0), 0)
    assert verdict.passed
    assert verdict.loss == pytest.approx(-0.025)


def test_answers_that_are_not_numbers_never_pass() -> None:
    logits = RIGHT.clone()
    logits[7, 2] = float("nan")
    verdict = judge_recipe("accuracy", RIGHT, logits, LABELS, _gate(1.0), 0)
    assert not verdict.passed
    assert verdict.to_json()["loss"] is None


def test_answers_near_random_never_pass_however_much_is_tolerated() -> None:
    torch.manual_seed(0)
    assert not judge_recipe("accuracy", RIGHT, torch.randn(200, 4), LABELS, _gate(1.0), 0).passed
    constant = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(200, 1)
    assert not judge_recipe("accuracy", RIGHT, constant, LABELS, _gate(1.0), 0).passed
    assert judge_recipe("accuracy", constant, constant * 0.9, LABELS, _gate(0.0), 0).passed


def test_answers_do_not_move_when_all_logits_shift() -> None:
    assert answers_moved(RIGHT, RIGHT + 3.0) == pytest.approx(0.0, abs=1e-6)
    assert answers_moved(RIGHT, _wrong_on(50)) > answers_moved(RIGHT, _wrong_on(5)) > 0


def test_layers_that_need_not_stay_are_given_back() -> None:
    found = fewest_in_float(list("abcd"), 4, lambda names: {"b", "c"} <= set(names))
    assert found == ["b", "c"]


def test_no_more_layers_than_allowed() -> None:
    assert fewest_in_float(list("abcd"), 2, lambda names: "c" in names) is None
    assert fewest_in_float(list("abcd"), 0, lambda names: True) == []


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4))
def test_without_any_one_of_the_layers_found_the_gate_fails(enough: list[set[int]]) -> None:
    def passes(names: Sequence[str]) -> bool:
        return any(wanted <= {int(name) for name in names} for wanted in enough)

    found = fewest_in_float([str(number) for number in range(6)], 6, passes)
    assert found is not None
    assert passes(found)
    assert not any(passes([other for other in found if other != name]) for name in found)


@pytest.mark.parametrize("factor", [None, torch.linspace(0.5, 2.0, 16)])
def test_the_simulation_is_the_quantized_layer(factor: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    fake = FakeQuantizedLinear(nn.Linear(16, 8), ActivationRange.covering(-1.0, 2.0), factor, 127)
    inputs = torch.randn(50, 16)
    torch.testing.assert_close(fake(inputs), fake.quantized()(inputs), atol=1e-6, rtol=1e-5)


def test_gradients_pass_straight_through_inside_the_range_and_stop_outside() -> None:
    torch.manual_seed(0)
    fake = FakeQuantizedLinear(nn.Linear(2, 1), ActivationRange.covering(-1.0, 1.0), None, 127)
    inputs = torch.tensor([[0.3, 5.0]], requires_grad=True)
    fake(inputs).sum().backward()
    rounded = fake.quantized()
    weight = rounded.weight * rounded.weight_scale[:, None]
    assert inputs.grad is not None
    assert inputs.grad[0, 0].item() == pytest.approx(weight[0, 0].item())
    assert inputs.grad[0, 1].item() == 0.0
    assert fake.step.grad is not None
    assert fake.step.grad.item() != 0.0

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.latency import Deployment, LatencyTable
from stages.prune.saliency import Saliency
from stages.prune.search import Option, block_options, find_parts, least_loss, rearrange

# Attention costs 10 a head, feed-forward 1 a neuron but for steps: 3 and 4 neurons take as long.
TABLE = LatencyTable(
    runtime="onnxruntime-cpu",
    deployment=Deployment(False, False, 21),
    rest=5.0,
    shell=1.0,
    heads={1: 10.0, 2: 20.0},
    neurons={1: 1.0, 2: 2.0, 3: 4.0, 4: 4.0},
    last=1.0,
)

blocks = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(blocks, st.integers(1, 40))
def test_the_knapsack_finds_what_trying_everything_finds(offers: list[list[tuple[int, int]]], budget: int) -> None:
    options = [[Option(i, loss, seconds) for i, (seconds, loss) in enumerate(block)] for block in offers]
    fitting = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*options)
        if sum(option.seconds for option in choice) <= budget
    ]
    chosen = least_loss(options, budget, ticks=budget)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(option.seconds for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == min(fitting)


def test_a_width_that_saves_no_time_is_not_given_up() -> None:
    # Without a step, 3 neurons would do; they take as long as 4.
    options = block_options(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, TABLE.feed_forward_seconds)
    assert [(option.width, option.loss, option.seconds) for option in options] == [
        (0, 10.0, 0.0), (1, 6.0, 1.0), (2, 3.0, 2.0), (3, 1.0, 4.0), (4, 0.0, 4.0),
    ]  # fmt: skip
    chosen = least_loss([options], 4.0)
    assert chosen is not None
    assert chosen[0].width == 4


def test_widths_offered_are_multiples() -> None:
    options = block_options(torch.ones(10), 4, TABLE.feed_forward_seconds)
    assert [option.width for option in options] == [0, 4, 8, 10]


@given(st.integers(0, 10_000))
def test_rearranging_never_loses_more_and_removes_as_many(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 9, generator=generator).double()
    removed = torch.rand(9, generator=generator) < 0.5
    fisher = rows.T @ rows
    after = rearrange(fisher, removed)
    assert after.sum() == removed.sum()

    def loss(mask: torch.Tensor) -> float:
        return float(mask.double() @ fisher @ mask.double())

    assert loss(after) <= loss(removed) + 1e-9


def test_rearranging_sees_that_two_parts_do_the_same() -> None:
    # Parts 0 and 1 are small but push alike: together they lose 4; 0 and 2 push apart and lose 0.25.
    rows = torch.tensor([[1.0, 1.0, -1.5]]).double()
    removed = torch.tensor([True, True, False])
    after = rearrange(rows.T @ rows, removed)
    assert after[2]
    assert after.sum() == 2


def _gradients(heads: list[float], neurons: list[float]) -> Saliency:
    return Saliency(torch.tensor([heads]), torch.tensor([neurons]))


def test_dead_parts_go_first_and_a_block_may_lose_all() -> None:
    gradients = [
        _gradients([0.0, 0.0], [3.0, 0.0, 2.0, 0.0]),
        _gradients([5.0, 4.0], [0.0, 0.0, 0.0, 0.0]),
    ]
    # Shells and rest take 7, the heads of the second layer 20, two neurons of the first 2. Times are rounded up.
    parts = find_parts(gradients, TABLE, 29.1, 1, "second_order")
    assert parts is not None
    assert [(part.heads.tolist(), part.neurons.tolist()) for part in parts] == [([], [0, 2]), ([0, 1], [])]


def test_nothing_fits_where_the_rest_takes_too_long() -> None:
    assert find_parts([_gradients([1.0, 1.0], [1.0] * 4)], TABLE, 5.5, 1, "second_order") is None


@pytest.mark.parametrize("budget", [7.0, 17.0, 30.0, 100.0])
def test_the_budget_is_kept(budget: float) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [
        Saliency(torch.randn(6, 2, generator=generator), torch.randn(6, 4, generator=generator)) for _ in range(2)
    ]
    parts = find_parts(gradients, TABLE, budget, 2, "second_order")
    assert parts is not None
    seconds = TABLE.rest + sum(
        TABLE.shell + TABLE.attention_seconds(len(part.heads)) + TABLE.feed_forward_seconds(len(part.neurons))
        for part in parts
    )
    assert seconds <= budget
    assert all(len(part.neurons) in (0, 2, 4) for part in parts)

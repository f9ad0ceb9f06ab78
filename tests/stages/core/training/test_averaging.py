"""The running mean of the weights, by hand, in place of the weights, and at no cost where nothing is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.core.training.averaging import WeightAverage


class Tied(nn.Module):
    """An embedding whose weight the head shares, a frozen layer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight = self.embedding.weight
        self.embedding.weight.data.zero_()


def test_the_mean_by_hand() -> None:
    model = Tied()
    average = WeightAverage(model, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, -3.0, 4.0], 1):
        model.embedding.weight.data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, 5/14, all below a half
        expected = decay * expected + (1 - decay) * value
    assert average.tensors["embedding.weight"].tolist() == [[pytest.approx(expected)]] * 2
    for step in range(8, 10):  # 9/18 and 10/19: from here on a half
        average.update(step)
        expected = 0.5 * expected + 0.5 * 4.0
    assert average.tensors["embedding.weight"].tolist() == [[pytest.approx(expected)]] * 2


def test_only_what_is_trained_is_kept_and_tied_weights_once() -> None:
    assert set(WeightAverage(Tied(), 0.9).tensors) == {"embedding.weight"}


def test_it_stands_in_place_of_the_weights_and_gives_them_back_to_the_bit() -> None:
    model = Tied()
    average = WeightAverage(model, 0.9)
    model.embedding.weight.data.copy_(torch.tensor([[0.1], [0.3]]))
    model.norm.running_mean.fill_(7.0)
    average.update(1)
    weight = model.embedding.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.equal(model.embedding.weight, average.tensors["embedding.weight"])
        assert model.head.weight is model.embedding.weight
        assert float(model.norm.running_mean) == 7.0  # buffers are the model's own
        raise ZeroDivisionError
    assert torch.equal(model.embedding.weight, weight)
    average.apply()
    assert torch.equal(model.embedding.weight, average.tensors["embedding.weight"])


def test_without_a_decay_nothing_is_kept_or_changed() -> None:
    model = Tied()
    average = WeightAverage(model, None)
    before = model.embedding.weight.detach().clone()
    average.update(1)
    with average.applied():
        assert torch.equal(model.embedding.weight, before)
    average.apply()
    assert torch.equal(model.embedding.weight, before)
    assert average.tensors == {}

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from stages.core.checkpoints import load_model
from stages.core.structure import attention_output, encoder_layers, keep_parts, neuron_output
from stages.prune.__main__ import _of_what_is_left
from stages.prune.saliency import Order, Saliency, gate_gradients, score
from stages.prune.select import parts_to_keep

IDS = torch.arange(5, 53).reshape(6, 8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def _saliency(model: torch.nn.Module, order: Order) -> list[Saliency]:
    def loss(batch: object) -> torch.Tensor:
        rows = list(batch)  # type: ignore[call-overload]
        return functional.cross_entropy(model(input_ids=IDS[rows]).logits, LABELS[rows], reduction="sum")

    return score(gate_gradients(model, [[0, 1, 2], [3, 4, 5]], loss), order)


@pytest.mark.parametrize("order", ["first_order", "second_order"])
def test_provably_dead_parts_score_zero_and_go_at_no_loss(order: Order, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    for layer in encoder_layers(model):
        attention_output(layer).weight.data.view(32, 4, 8)[:, 2] = 0.0
        neuron_output(layer).weight.data[:, 10:20] = 0.0
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    saliency = _saliency(model, order)
    heads = parts_to_keep([s.heads for s in saliency], 0.25, 1, 1)
    neurons = parts_to_keep([s.neurons for s in saliency], 10 / 64, 1, 1)
    for layer, kept_heads, kept_neurons in zip(encoder_layers(model), heads, neurons, strict=True):
        assert kept_heads.tolist() == [0, 1, 3]
        assert kept_neurons.tolist() == [*range(10), *range(20, 64)]
        keep_parts(layer, kept_heads, kept_neurons)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-5, rtol=0)


def test_saliency_is_the_gradient_of_a_gate_by_finite_difference(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    part, step = 3, 1e-2
    text = [1]

    def loss(batch: object) -> torch.Tensor:
        return functional.cross_entropy(model(input_ids=IDS[text]).logits, LABELS[text], reduction="sum")

    measured = score(gate_gradients(model, [text], loss), "first_order")[0].neurons[part].item()
    weight = neuron_output(encoder_layers(model)[0]).weight.data
    original, losses = weight[:, part].clone(), []
    for factor in (1 + step, 1 - step):
        weight[:, part] = original * factor
        losses.append(loss(None).item())
    weight[:, part] = original
    assert measured == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=0.05, abs=1e-5)


def test_saliency_does_not_depend_on_how_texts_are_batched(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)

    def loss(batch: object) -> torch.Tensor:
        rows = list(batch)  # type: ignore[call-overload]
        return functional.cross_entropy(model(input_ids=IDS[rows]).logits, LABELS[rows], reduction="sum")

    one = score(gate_gradients(model, [[0, 1, 2, 3, 4, 5]], loss), "second_order")
    other = score(gate_gradients(model, [[0], [1, 2], [3, 4, 5]], loss), "second_order")
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.heads, b.heads)
        torch.testing.assert_close(a.neurons, b.neurons)


def test_a_layer_without_parts_has_no_gradients(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    keep_parts(encoder_layers(model)[0], torch.arange(0), torch.arange(0))
    first, last = _saliency(model, "second_order")
    assert first.heads.shape == first.neurons.shape == (0,)
    assert last.heads.shape == (4,)


def test_the_least_salient_go_first_across_layers() -> None:
    scores = [torch.tensor([9.0, 1.0, 8.0]), torch.tensor([7.0, 2.0, 3.0])]
    assert [kept.tolist() for kept in parts_to_keep(scores, 0.5, 1, 1)] == [[0, 2], [0]]


def test_every_layer_keeps_the_minimum_and_a_multiple() -> None:
    scores = [torch.arange(16.0), torch.arange(16.0) + 100]
    kept = parts_to_keep(scores, 0.5, minimum=4, multiple=4)
    assert [layer.tolist() for layer in kept] == [[12, 13, 14, 15], list(range(16))]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), min_size=1, max_size=5),
    st.floats(0, 0.99),
    st.integers(1, 6),
)
def test_selection_invariants(layers: list[list[float]], removed: float, multiple: int) -> None:
    kept = parts_to_keep([torch.tensor(layer) for layer in layers], removed, 1, multiple)
    for layer, indices in zip(layers, kept, strict=True):
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert 1 <= len(indices) <= len(layer)
        assert len(indices) == len(layer) or len(indices) % multiple == 0
    assert sum(map(len, kept)) >= (1 - removed) * sum(map(len, layers)) - 1e-6


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_together_reach_the_sparsity(rounds: int) -> None:
    left = 1.0
    for index in range(rounds):
        left *= 1 - _of_what_is_left(0.6, index, rounds)
    assert left == pytest.approx(0.4)

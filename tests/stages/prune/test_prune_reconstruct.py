import copy
from pathlib import Path

import numpy
import scipy.linalg
import torch

from stages.core.checkpoints import load_model
from stages.core.structure import attention_output, encoder_layers, keep_parts, neuron_output
from stages.prune.reconstruct import NormalEquations, reconstruct

ROWS = [
    [2, *range(5 + start, 5 + start + length), 3] for start, length in zip(range(40), [3, 7, 5, 4] * 10, strict=True)
]


def test_the_fit_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, residual = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    equations = NormalEquations.empty(6, 3)
    equations.add(inputs[:20], residual[:20])
    equations.add(inputs[20:], residual[20:])
    weight, bias = equations.solve(ridge=0.0)
    wanted = scipy.linalg.lstsq(numpy.column_stack([inputs, numpy.ones(50)]), residual)[0]
    numpy.testing.assert_allclose(torch.cat([weight.T, bias[None]]).numpy(), wanted, atol=1e-5)

    ridge = 0.3
    weight, bias = equations.solve(ridge)
    penalty = (ridge * inputs.square().sum(dim=0).mean()).sqrt() * torch.eye(6, 7)
    rows = torch.cat([torch.column_stack([inputs, torch.ones(50)]), penalty])
    wanted = scipy.linalg.lstsq(rows.numpy(), torch.cat([residual, torch.zeros(6, 3)]).numpy())[0]
    numpy.testing.assert_allclose(torch.cat([weight.T, bias[None]]).numpy(), wanted, atol=1e-5)


def test_a_fit_by_hand() -> None:
    # What is missing is 2 x + 1.
    equations = NormalEquations.empty(1, 1)
    equations.add(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.0], [3.0], [7.0]]))
    weight, bias = equations.solve(ridge=0.0)
    assert round(weight.item(), 5) == 2.0
    assert round(bias.item(), 5) == 1.0


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])


def test_removing_a_copy_of_another_neuron_is_made_up_for_exactly(tiny_checkpoint: Path) -> None:
    dense = load_model(tiny_checkpoint)
    for layer in encoder_layers(dense):
        inner = layer.get_submodule("intermediate.dense")
        inner.weight.data[1], inner.bias.data[1] = inner.weight.data[0], inner.bias.data[0]
    model = copy.deepcopy(dense)
    for layer in encoder_layers(model):
        keep_parts(layer, torch.arange(4), torch.tensor([0, *range(2, 64)]))
    cut = (_logits(model) - _logits(dense)).abs().max()
    reconstruct(model, dense, ROWS, 0, ridge=1e-6)
    assert cut > 1e-3
    assert (_logits(model) - _logits(dense)).abs().max() < 0.05 * cut


def test_dead_parts_leave_nothing_to_fit(tiny_checkpoint: Path) -> None:
    dense = load_model(tiny_checkpoint)
    for layer in encoder_layers(dense):
        attention_output(layer).weight.data.view(32, 4, 8)[:, 2] = 0.0
        neuron_output(layer).weight.data[:, 10:20] = 0.0
    model = copy.deepcopy(dense)
    for layer in encoder_layers(model):
        keep_parts(layer, torch.tensor([0, 1, 3]), torch.tensor([*range(10), *range(20, 64)]))
    reconstruct(model, dense, ROWS, 0)
    torch.testing.assert_close(_logits(model), _logits(dense), atol=1e-5, rtol=0)


def test_blocks_without_parts_get_their_mean_back(tiny_checkpoint: Path) -> None:
    dense = load_model(tiny_checkpoint)
    model = copy.deepcopy(dense)
    keep_parts(encoder_layers(model)[0], torch.arange(0), torch.arange(0))
    cut = (_logits(model) - _logits(dense)).square().mean()
    reconstruct(model, dense, ROWS, 0)
    assert (_logits(model) - _logits(dense)).square().mean() < cut

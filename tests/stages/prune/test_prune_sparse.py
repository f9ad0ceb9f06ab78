import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.linalg
import torch
from torch import Tensor

from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.params import NOfMParams, SparseParams, UnstructuredParams
from stages.core.quantized import QuantizedLinear
from stages.core.structure import encoder_layers, neuron_input, neuron_output
from stages.prune.sparse import Pattern, gram_matrices, kept_by_pattern, magnitude, sparsegpt, sparsify, wanda

HALF = UnstructuredParams(kind="unstructured", sparsity=0.5)
TWO_OF_FOUR = NOfMParams(kind="n_of_m", n=2, m=4)
WEIGHT = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, -0.4, 0.3]])
ROWS = [list(range(5, 5 + length)) for length in (4, 9, 14, 20)]


def _correlated(tokens: int, features: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(tokens, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)


def _error(weight: Tensor, sparse: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - sparse).double().T).square().sum())


def test_magnitude_by_hand() -> None:
    assert magnitude(WEIGHT, HALF).tolist() == [[4.0, -3.0, 2.0, 1.0], [0.0] * 4]
    expected = torch.tensor([[4.0, -3.0, 0.0, 0.0], [0.0, 0.0, -0.4, 0.3]])
    assert torch.equal(magnitude(WEIGHT, TWO_OF_FOUR), expected)


def test_wanda_by_hand() -> None:
    # Input norms 1, 1, 3, 5: the first row scores 4, 3, 6, 5; the second 0.1, 0.2, 1.2, 1.5.
    gram = torch.diag(torch.tensor([1.0, 1.0, 9.0, 25.0]))
    expected = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, -0.4, 0.3]])
    assert torch.equal(wanda(WEIGHT, gram, HALF), expected)
    assert torch.equal(wanda(WEIGHT, gram, TWO_OF_FOUR), expected)
    quarter = UnstructuredParams(kind="unstructured", sparsity=0.25)
    assert wanda(WEIGHT, gram, quarter)[0].tolist() == [4.0, 0.0, 2.0, 1.0]


def test_of_equal_scores_the_first_stays_and_the_count_is_exact() -> None:
    assert kept_by_pattern(torch.zeros(2, 8), TWO_OF_FOUR).tolist() == [[True, True, False, False] * 2] * 2
    third = UnstructuredParams(kind="unstructured", sparsity=1 / 3)
    assert kept_by_pattern(torch.zeros(1, 9), third).sum() == 6


def test_sparsegpt_removes_one_weight_as_optimal_brain_surgery_does() -> None:
    inputs = _correlated(50, 4, seed=1)
    gram = inputs.T @ inputs
    weight = torch.tensor([[0.01, 2.0, -3.0, 1.5]])
    inverse = numpy.linalg.inv(gram.numpy())
    row = weight[0].double().numpy()
    wanted = row - row[0] / inverse[0, 0] * inverse[:, 0]  # Hassibi & Stork 1992, for weight 0
    one = UnstructuredParams(kind="unstructured", sparsity=0.25)
    numpy.testing.assert_allclose(sparsegpt(weight, gram, one, damping=0.0)[0].numpy(), wanted, rtol=1e-5)
    numpy.testing.assert_allclose(
        sparsegpt(weight, gram, NOfMParams(kind="n_of_m", n=3, m=4), 0.0)[0], wanted, rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_solves_for_the_weights_right_of_a_removed_one(seed: int) -> None:
    inputs = _correlated(60, 8, seed)
    weight = torch.randn(1, 8, dtype=torch.float64)
    one = UnstructuredParams(kind="unstructured", sparsity=0.125)
    sparse = sparsegpt(weight, inputs.T @ inputs, one, damping=0.0)
    gone = int((sparse[0] == 0).nonzero())
    x, w = inputs.numpy(), weight[0].numpy()
    right = scipy.linalg.lstsq(x[:, gone + 1 :], x[:, gone:] @ w[gone:])[0] if gone < 7 else []
    numpy.testing.assert_allclose(sparse[0].numpy(), [*w[:gone], 0.0, *right], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR])
@pytest.mark.parametrize("seed", range(8))
def test_sparsegpt_lies_between_the_optimum_and_magnitude(pattern: Pattern, seed: int) -> None:
    inputs = _correlated(100, 8, seed)
    weight = torch.randn(1, 8)
    sparse = sparsegpt(weight, inputs.T @ inputs, pattern)
    assert (sparse == 0).sum() == 4
    target = inputs @ weight[0].double()
    optimum = float("inf")
    for kept in itertools.combinations(range(8), 4):
        columns = inputs[:, list(kept)].numpy()
        best = scipy.linalg.lstsq(columns, target.numpy())[0]
        optimum = min(optimum, float(((columns @ best - target.numpy()) ** 2).sum()))
    assert optimum * (1 - 1e-6) <= _error(weight, sparse, inputs) <= _error(weight, magnitude(weight, pattern), inputs)


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR])
def test_sparsegpt_beats_wanda_beats_magnitude_on_a_wide_layer(pattern: Pattern) -> None:
    torch.manual_seed(3)
    mixing = torch.eye(300) + torch.randn(300, 300) / 40
    inputs = (torch.randn(600, 300) @ mixing * torch.linspace(0.1, 5.0, 300)[torch.randperm(300)]).double()
    weight = torch.randn(40, 300)
    gram = inputs.T @ inputs
    sparse = {
        "sparsegpt": sparsegpt(weight, gram, pattern),
        "wanda": wanda(weight, gram.float(), pattern),
        "magnitude": magnitude(weight, pattern),
    }
    errors = [_error(weight, each, inputs) for each in sparse.values()]
    assert errors == sorted(errors)
    for each in sparse.values():
        assert float((each == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_inputs_that_never_flow_go_and_leave_the_rest_alone() -> None:
    inputs = _correlated(40, 4, seed=0)
    inputs[:, 2] = 0.0
    weight = torch.tensor([[1.0, 2.0, 30.0, 3.0]])
    one = UnstructuredParams(kind="unstructured", sparsity=0.25)
    assert torch.equal(sparsegpt(weight, inputs.T @ inputs, one), torch.tensor([[1.0, 2.0, 0.0, 3.0]]))


def test_gram_leaves_padding_out(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    linears = {"first": neuron_input(encoder_layers(model)[1])}
    alone: Any = sum(gram_matrices(model, linears, [row], 0)["first"] for row in ROWS)
    torch.testing.assert_close(gram_matrices(model, linears, ROWS, 0)["first"], alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR])
def test_a_sparse_model_keeps_its_zeros_through_saving_and_int8(
    method: Any, pattern: Pattern, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_checkpoint)
    shares = sparsify(model, ROWS, 0, SparseParams(method=method, pattern=pattern))
    assert list(shares) == ["0", "1"]
    assert all(share == pytest.approx(0.5, abs=0.02) for layer in shares.values() for share in layer.values())
    assert len(shares["0"]) == 6
    save_model(model, tmp_path, tiny_checkpoint, [])
    reloaded = load_model(tmp_path)
    for layer, again in zip(encoder_layers(model), encoder_layers(reloaded), strict=True):
        linear = neuron_output(again)
        assert torch.equal(linear.weight, neuron_output(layer).weight)
        assert (QuantizedLinear.from_linear(linear, None).weight[linear.weight == 0] == 0).all()


def test_groups_that_do_not_fit_are_refused(tiny_checkpoint: Path) -> None:
    params = SparseParams(method="magnitude", pattern=NOfMParams(kind="n_of_m", n=1, m=5))
    with pytest.raises(
        UserError, match=r"m: 5 does not divide the 32 inputs of encoder layer 0, attention\.self\.query"
    ):
        sparsify(load_model(tiny_checkpoint), ROWS, 0, params)

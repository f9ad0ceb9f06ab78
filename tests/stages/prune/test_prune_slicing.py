import copy
import math
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import sklearn.decomposition
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stages.core.checkpoints import count_parameters, load_model, save_model
from stages.core.errors import UserError
from stages.core.lean import LeanClassifier, fits
from stages.core.onnx_graph import LogitsOnly, export_onnx
from stages.core.quantized import ActivationRange, QuantizedLinear, replace_module
from stages.core.sliced import check_sliceable, find_sites
from stages.core.structure import encoder_layers, hidden_width, is_sliced, keep_layers, keep_parts, quantizable_linears
from stages.prune.reconstruct import reconstruct
from stages.prune.slicing import (
    apply_bases,
    cosines,
    find_bases,
    multiplications,
    narrow_width,
    narrowed,
    principal_basis,
    residual_multiplications,
    slice_hidden,
)

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}

ROWS = [
    [2, *range(5 + start, 5 + start + length), 3] for start, length in zip(range(36), [3, 7, 5, 4] * 9, strict=True)
]
IDS = torch.arange(5, 29).reshape(3, 8)
MASK = (torch.arange(8) < torch.tensor([8, 5, 3])[:, None]).long()


def _build(family: str) -> nn.Module:
    torch.manual_seed(3)
    if family == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(pad_token_id=1, **SIZES)).eval()
    return BertForSequenceClassification(BertConfig(pad_token_id=1, **SIZES)).eval()


def _model(family: str = "bert") -> nn.Module:
    """A classifier whose norms have scales and shifts of all kinds."""
    model = _build(family)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
        elif name.endswith("bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _irregular(model: nn.Module) -> nn.Module:
    first, second = encoder_layers(model)
    keep_parts(first, torch.arange(0), torch.tensor([1, 5, 40]))
    keep_parts(second, torch.tensor([0, 2]), torch.arange(0))
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("irregular", [False, True])
def test_without_slicing_the_rotation_is_exact(
    family: str, irregular: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = _model(family).to(dtype)
    if irregular:
        _irregular(model)
    before = _logits(model)
    bases = slice_hidden(model, 32, ROWS, 1)
    assert is_sliced(model)
    assert all(basis.kept == 1.0 and basis.energy == 32.0 for basis in bases)
    torch.testing.assert_close(_logits(model), before, atol=tolerance, rtol=0)


def _in_a_subspace(rank: int) -> nn.Module:
    """A model in float64 that adds nothing to hidden states outside a subspace of `rank` dimensions.

    Of each norm the scale is one and the shift zero, so all states stay in it.
    """
    model = _build("bert").double()
    directions = torch.linalg.qr(torch.randn(32, rank + 1, generator=torch.Generator().manual_seed(0)).double()).Q
    directions = torch.linalg.qr(directions[:, :rank] - directions[:, :rank].mean(dim=0)).Q
    inside = directions @ directions.T
    for name, parameter in model.named_parameters():
        if "embeddings" in name and parameter.dim() == 2:
            parameter.data = parameter.data @ inside
        if name.endswith("output.dense.weight"):
            parameter.data = inside @ parameter.data
        if name.endswith("output.dense.bias"):
            parameter.data = inside @ parameter.data
    return model


def test_directions_that_are_never_used_go_at_no_loss() -> None:
    model = _in_a_subspace(20)
    before, sliced, smaller = _logits(model), copy.deepcopy(model), copy.deepcopy(model)
    bases = slice_hidden(sliced, 21, ROWS, 1)  # 20 components, and one dimension that a layer norm takes
    assert all(basis.kept == pytest.approx(1.0) and basis.energy == pytest.approx(32.0) for basis in bases)
    torch.testing.assert_close(_logits(sliced), before, atol=1e-8, rtol=0)
    slice_hidden(smaller, 12, ROWS, 1)
    assert (_logits(smaller) - before).abs().max() > 1e-4


def test_what_never_varies_is_kept_in_the_biases_however_large() -> None:
    # n = 1.8 u + or - b v, of length 2: the component is v, and u, though larger, costs nothing.
    constant, varying = torch.tensor([1.0, -1.0, 0.0, 0.0]).double(), torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    constant, varying = 1.8 * constant / math.sqrt(2.0), math.sqrt(4.0 - 1.8**2) * varying / 2.0
    sums = torch.stack([constant + varying, constant - varying])[None]
    norm = nn.LayerNorm(4, eps=1e-12).double()
    basis = principal_basis(norm, [sums], [torch.ones(1, 2, dtype=torch.bool)], 2)
    torch.testing.assert_close(basis.center, constant, atol=1e-9, rtol=0)
    assert basis.energy == pytest.approx(4.0 - 1.8**2)
    torch.testing.assert_close(narrowed(norm, basis, sums), norm(sums), atol=1e-9, rtol=0)


def test_components_and_variance_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(2)
    sums = torch.randn(3, 40, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    mask = torch.arange(40)[None] < torch.tensor([40, 30, 7])[:, None]
    norm = nn.LayerNorm(10)
    basis = principal_basis(norm, [sums[:2], sums[2:]], [mask[:2], mask[2:]], 6)
    seen = norm(sums)[mask].detach().double().numpy()
    known = sklearn.decomposition.PCA(5).fit(seen)
    assert basis.kept == pytest.approx(known.explained_variance_ratio_.sum(), rel=1e-5)
    projector = known.components_.T @ known.components_
    numpy.testing.assert_allclose((basis.matrix @ basis.matrix.T).numpy(), projector, atol=1e-5)
    numpy.testing.assert_allclose(basis.center.numpy(), known.mean_ - projector @ known.mean_, atol=1e-5)
    kept = numpy.square(seen @ projector).sum(axis=1).mean()
    assert basis.energy == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("size", [2, 7, 24])
def test_narrow_dimensions_have_no_sum_and_spread_evenly(size: int) -> None:
    rows = cosines(size)
    torch.testing.assert_close(rows @ rows.T, torch.eye(size - 1).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows.sum(dim=1), torch.zeros(size - 1).double(), atol=1e-12, rtol=0)
    assert rows.abs().max() <= math.sqrt(2.0 / size)


def test_the_sliced_model_computes_what_projected_norms_would() -> None:
    model = _irregular(_model()).double()
    bases = find_bases(model, 24, ROWS, 1)
    projected, handles = copy.deepcopy(model), []
    for site, basis in zip(find_sites(projected), bases, strict=True):
        norm: Any = projected.get_submodule(site.norm)
        handles.append(norm.register_forward_hook(lambda norm, given, _, basis=basis: narrowed(norm, basis, given[0])))
    apply_bases(model, bases)
    torch.testing.assert_close(_logits(model), _logits(projected), atol=1e-10, rtol=0)


def test_parameters_and_multiplications_are_as_counted_by_hand() -> None:
    model = _irregular(_model())
    assert multiplications(model) == 2 * 3 * 32 + 4 * 16 * 32
    slice_hidden(model, 24, ROWS, 1)
    tables = (50 + 40 + 2) * 24
    norms = 5 * 2 * 24
    skips = 4 * 24 * 24
    first = 24 + (3 * 24 + 3) + (24 * 3 + 24)  # a bias in the place of attention; 3 neurons
    second = 3 * (16 * 24 + 16) + (24 * 16 + 24) + 24  # 2 heads of 8; a bias in the place of neurons
    head = (32 * 24 + 32) + (2 * 32 + 2)
    assert count_parameters(model) == tables + norms + skips + first + second + head
    assert multiplications(model) == 2 * 3 * 24 + 4 * 16 * 24 + skips
    assert residual_multiplications(model) == skips
    assert hidden_width(model) == 24


@pytest.mark.parametrize("irregular", [False, True])
def test_saved_loaded_exported_and_quantized_it_answers_alike(
    irregular: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_checkpoint)
    if irregular:
        _irregular(model)
    slice_hidden(model, 24, ROWS, 0)
    save_model(model, tmp_path / "sliced", tiny_checkpoint, [])
    again = load_model(tmp_path / "sliced")
    assert is_sliced(again)
    torch.testing.assert_close(_logits(again), _logits(model), atol=0, rtol=0)

    assert fits(again)
    with torch.no_grad():
        torch.testing.assert_close(LeanClassifier(again)(IDS, MASK), LogitsOnly(again)(IDS, MASK), atol=1e-5, rtol=0)
    if not irregular:  # an export takes seconds
        torch.testing.assert_close(_exported(again, tmp_path / "float.onnx"), _logits(model), atol=1e-4, rtol=0)
        return

    names = quantizable_linears(again)
    assert sum(name.endswith("skip") for name in names) == 4
    for name in names:
        linear: Any = again.get_submodule(name)
        replace_module(again, name, QuantizedLinear.from_linear(linear, ActivationRange.covering(-4.0, 4.0)))
    save_model(again, tmp_path / "quantized", tiny_checkpoint, [])
    small = load_model(tmp_path / "quantized")
    torch.testing.assert_close(_logits(small), _logits(again), atol=0, rtol=0)
    step = 0.05 * float(_logits(model).abs().max())  # a rounding that falls the other way, in a few places
    torch.testing.assert_close(_exported(small, tmp_path / "int8.onnx"), _logits(small), atol=step, rtol=0)


def _exported(model: nn.Module, path: Path) -> Tensor:
    export_onnx(model, path, ["input_ids", "attention_mask"], "logits", opset=20)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()})[0])


def test_parts_can_go_after_slicing() -> None:
    model = _model()
    slice_hidden(model, 24, ROWS, 1)
    masked = copy.deepcopy(model)
    for layer in encoder_layers(masked):
        layer.get_submodule("attention.output.dense").weight.data[:, :8] = 0.0  # type: ignore[index, union-attr]
        layer.get_submodule("output.dense").weight.data[:, :10] = 0.0  # type: ignore[index, union-attr]
    for layer in encoder_layers(model):
        keep_parts(layer, torch.arange(1, 4), torch.arange(10, 48))
    torch.testing.assert_close(_logits(model), _logits(masked), atol=1e-5, rtol=0)


def test_least_squares_bring_the_states_nearer() -> None:
    dense = _model()
    model = copy.deepcopy(dense)
    bases = slice_hidden(model, 16, ROWS, 1)
    fitted = copy.deepcopy(model)
    matrices = [basis.matrix.float() for basis in bases[1:]]
    reconstruct(fitted, dense, ROWS, 1, bases=matrices)
    assert _distance(fitted, dense, matrices[0]) < 0.9 * _distance(model, dense, matrices[0])


def _distance(model: nn.Module, dense: nn.Module, matrix: Tensor) -> float:
    """Squared error of what goes into the first layer's first norm, on the texts of the fit."""
    total = 0.0
    for row in ROWS:
        seen: list[Tensor] = []
        for each in (model, dense):
            norm = encoder_layers(each)[0].get_submodule("attention.output.LayerNorm")
            handle = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].detach()))
            each(input_ids=torch.tensor([row]))
            handle.remove()
        total += float((seen[0] - seen[1] @ matrix).square().sum())
    return total


def test_without_slicing_there_is_nothing_to_fit() -> None:
    dense = _model()
    model = copy.deepcopy(dense)
    bases = slice_hidden(model, 32, ROWS, 1)
    reconstruct(model, dense, ROWS, 1, bases=[basis.matrix.float() for basis in bases[1:]])
    torch.testing.assert_close(_logits(model), _logits(dense), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("share", "width"), [(0.25, 288), (0.2, 320), (0.01, 384), (0.999, 16)])
def test_widths_are_rounded_up(share: float, width: int) -> None:
    assert narrow_width(384, share, 16) == width


def test_what_cannot_be_sliced_is_told_in_one_line() -> None:
    small: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
    with pytest.raises(UserError, match="prune.hidden_slicing: electra projects its embeddings without a norm; set it"):
        check_sliceable(ElectraForSequenceClassification(ElectraConfig(embedding_size=16, **small)))
    with pytest.raises(UserError, match=r"prune.hidden_slicing: BertForMaskedLM is no classifier of the BERT family"):
        check_sliceable(BertForMaskedLM(BertConfig(**small)))
    check_sliceable(ElectraForSequenceClassification(ElectraConfig(embedding_size=32, **small)))
    model = _model()
    check_sliceable(model)
    slice_hidden(model, 24, ROWS, 1)
    with pytest.raises(UserError, match="prune.hidden_slicing: the checkpoint is sliced already"):
        check_sliceable(model)
    with pytest.raises(UserError, match="hidden states are sliced, so no layer fits another's place"):
        keep_layers(model, [0])

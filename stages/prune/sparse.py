"""Zeros in the encoder's linear layers, single ones or `n` of `m` in a row; the layers keep their shapes.

Magnitude removes the smallest weights; Wanda the smallest |weight| x norm of what flows in (2306.11695); SparseGPT goes
through the columns, removes what hurts the layer's output least, and lets the columns to the right make up for it
(2301.00774). Encoder layers are treated in order, each with the inputs that the sparse ones before it give.

The tensors stay dense, zeros written out. The kernels of ONNX Runtime and OpenVINO multiply by zero as fast as by
anything else: no speed is gained, only a file that packs smaller. Int8 keeps every zero, since its weights are
symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.core.batches import length_batches
from stages.core.checkpoints import logits_of
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_pad_id, sample
from stages.core.observe.progress import track
from stages.core.params import NOfMParams, SparseParams, UnstructuredParams
from stages.core.stage import StageRun
from stages.core.structure import attention_linears, attention_output, encoder_layers, neuron_input, neuron_output
from stages.core.tensors import pad_tensors

Pattern = UnstructuredParams | NOfMParams

SPEED = "zeros in dense layers make no kernel of ONNX Runtime or OpenVINO faster; they only pack smaller"

_BATCH_SIZE = 32
_BLOCK = 128
_DAMPING = 0.01
_SHARING = dict.fromkeys(("attention.self.key", "attention.self.value"), "attention.self.query")
"""Layers that read the same input as another."""


def make_sparse(model: nn.Module, run: StageRun) -> dict[str, Any] | None:
    """Put zeros into a model, in place, as params ask; None where they do not.

    Returns:
        metrics: the method, the share of zeros by layer and overall, and what that means for speed.
    """
    params, data = run.params.prune.sparse, run.inputs["data"]
    if params is None:
        return None
    texts = sample(load_examples(data, "train"), run.params.prune.calibration_texts, run.params.seed)
    shares = sparsify(model, texts.input_ids, load_pad_id(data), params)
    overall = _share_of_zeros([linear.weight for layer in encoder_layers(model) for linear in _linears(layer).values()])
    run.say(f"{overall:.1%} of the weights in linear layers are zero; {SPEED}")
    return {"method": params.method, "layers": shares, "overall": overall, "speed": SPEED}


def sparsify(
    model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, params: SparseParams
) -> dict[str, dict[str, float]]:
    """Put zeros into every linear layer of the encoder, in place.

    Args:
        model: in evaluation mode.
        rows: token ids of the calibration texts.
        pad_id: token id that fills short texts.
        params: method and pattern.

    Returns:
        the share of zeros in each linear layer, by encoder layer.

    Raises:
        UserError: if a layer's inputs cannot be cut into groups of `m`.
    """
    shares: dict[str, dict[str, float]] = {}
    for index, layer in enumerate(track(list(encoder_layers(model)), "sparsify")):
        linears = _linears(layer)
        for name, linear in linears.items():
            _check_groups(linear, params.pattern, f"encoder layer {index}, {name}")
        inputs = {} if params.method == "magnitude" else gram_matrices(model, linears, rows, pad_id)
        for name, linear in linears.items():
            gram = inputs.get(_SHARING.get(name, name), torch.zeros(0))
            linear.weight = nn.Parameter(sparse_weight(linear.weight.detach(), gram, params))
        shares[str(index)] = {name: _share_of_zeros([linear.weight]) for name, linear in linears.items()}
    return shares


def sparse_weight(weight: Tensor, gram: Tensor, params: SparseParams) -> Tensor:
    """Choose the zeros of one layer; see `wanda` and `sparsegpt`. Magnitude reads no `gram`."""
    if params.method == "sparsegpt":
        return sparsegpt(weight, gram, params.pattern)
    if params.method == "wanda":
        return wanda(weight, gram, params.pattern)
    return magnitude(weight, params.pattern)


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Set the smallest weights [out, in] to zero; unstructured, all of the layer compete."""
    if isinstance(pattern, UnstructuredParams):
        kept = kept_by_pattern(weight.abs().reshape(1, -1), pattern).reshape(weight.shape)
    else:
        kept = kept_by_pattern(weight.abs(), pattern)
    return weight * kept


def wanda(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Set the weights of least |weight| x input norm to zero; each row by itself (Sun et al., 2306.11695).

    Args:
        weight: [out, in].
        gram: sum over the calibration tokens of input x input transposed, [in, in].
        pattern: of the zeros.
    """
    return weight * kept_by_pattern(weight.abs() * gram.diagonal().sqrt(), pattern)


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, damping: float = _DAMPING) -> Tensor:
    """Set weights to zero and let those to their right make up for it (Frantar & Alistarh, 2301.00774, algorithm 1).

    The columns are taken in their order, which on tiny or nearly singular layers can end worse than plain magnitude;
    then magnitude it is, so that the layer's output on the calibration texts is never further off than with that.

    Args:
        weight: [out, in].
        gram: sum over the calibration tokens of input x input transposed, [in, in].
        pattern: of the zeros; unstructured ones are chosen for a block of columns at a time, of all rows.
        damping: added to the diagonal of `gram`, as a share of its mean.
    """
    plain = magnitude(weight, pattern)
    original, weight, hessian = weight, weight.double().clone(), gram.double().clone()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0.0  # what never flows in may as well go
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    # Row j of this factor is, up to scale, row j of the inverse Hessian of the columns from j on.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    group = pattern.m if isinstance(pattern, NOfMParams) else None
    width = _BLOCK if group is None else max(1, _BLOCK // group) * group
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        errors = _sparsegpt_block(weight[:, start:end], inverse[start:end, start:end], pattern)
        weight[:, end:] -= errors @ inverse[start:end, end:]
    solved = weight.float()
    better = _output_error(solved - original, gram) <= _output_error(plain - original, gram)
    return solved if better else plain


def kept_by_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Choose what stays: in each row, or in each group of `m` in a row, the highest scores.

    Args:
        scores: [rows, columns]; of equal ones the first stays.
        pattern: of what goes.

    Returns:
        booleans [rows, columns].
    """
    if isinstance(pattern, NOfMParams):
        grouped = scores.reshape(-1, pattern.m)
        return _highest(grouped, pattern.n).reshape(scores.shape)
    return _highest(scores, scores.shape[1] - int(pattern.sparsity * scores.shape[1]))


def gram_matrices(
    model: nn.Module, linears: Mapping[str, nn.Linear], rows: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """Sum input x input transposed of linear layers over the tokens of texts; padding does not count.

    Args:
        model: in evaluation mode.
        linears: the layers by name; those that share another's input are left out.
        rows: token ids of the texts.
        pad_id: token id that fills short texts.

    Returns:
        float64 [in, in] by name.
    """
    sums: dict[str, Tensor] = {}
    mask = torch.zeros(0, dtype=torch.bool)

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach()[mask]
            sums[name] = sums.get(name, 0.0) + (seen.T @ seen).double()

        return add

    wanted = {name: linear for name, linear in linears.items() if name not in _SHARING}
    handles = [linear.register_forward_pre_hook(record(name)) for name, linear in wanted.items()]
    try:
        for batch in length_batches([len(row) for row in rows], _BATCH_SIZE):
            inputs = pad_tensors([rows[i] for i in batch], pad_id)
            mask = inputs["attention_mask"].bool()
            logits_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _sparsegpt_block(weight: Tensor, inverse: Tensor, pattern: Pattern) -> Tensor:
    """Treat one block of columns, in place.

    Args:
        weight: [out, block].
        inverse: the block of the Cholesky factor of the inverse Hessian, [block, block].
        pattern: of the zeros.

    Returns:
        what each removed weight leaves for the columns after the block, [out, block].
    """
    errors = torch.zeros_like(weight)
    scale = inverse.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool)
    if isinstance(pattern, UnstructuredParams):
        scores = (weight / scale).square()
        kept = kept_by_pattern(scores.reshape(1, -1), pattern).reshape(weight.shape)
    for column in range(weight.shape[1]):
        if isinstance(pattern, NOfMParams) and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            kept[:, group] = kept_by_pattern((weight[:, group] / scale[group]).square(), pattern)
        errors[:, column] = torch.where(kept[:, column], 0.0, weight[:, column]) / scale[column]
        weight[:, column:] -= errors[:, column, None] * inverse[column, column:]
        weight[:, column] *= kept[:, column]  # exactly zero, whatever was rounded
    return errors


def _highest(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    found = [*attention_linears(layer), attention_output(layer), neuron_input(layer), neuron_output(layer)]
    names = {id(part): name for name, part in layer.named_modules()}
    return {names[id(linear)]: linear for linear in found}


def _output_error(change: Tensor, gram: Tensor) -> float:
    """Squared error of a layer's output, summed over the calibration tokens, after its weights [out, in] changed."""
    return float(((change.double() @ gram.double()) * change).sum())


def _share_of_zeros(weights: Sequence[Tensor]) -> float:
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _check_groups(linear: nn.Linear, pattern: Pattern, where: str) -> None:
    if isinstance(pattern, NOfMParams) and linear.in_features % pattern.m:
        raise UserError(
            f"prune.sparse.pattern.m: {pattern.m} does not divide the {linear.in_features} inputs of {where}; "
            "choose another m, or a prune.neuron_multiple that m divides"
        )

"""Optimizers: first steps worked by hand, a convex problem for each, and the singular values of a step of Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_problem import BETAS
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from stages.core.errors import UserError
from stages.core.params import OptimizerParams, load_params
from stages.core.training.optimizers import MuonAndAdamW, build_optimizer, grouped, hidden_matrices

KINDS = tuple(BETAS)
RATE, DECAY = 0.1, 0.2


def params(kind: str, **changes: Any) -> OptimizerParams:
    default = load_params(Path(__file__).parents[4] / "presets" / "tiny.yaml").finetune.optimizer
    settings = {"kind": kind, "betas": BETAS[kind], "learning_rate": RATE, "weight_decay": DECAY, **changes}
    return default.model_copy(update=settings)


class Layered(nn.Module):
    """An embedding, two hidden layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)


def everywhere(name: str) -> float:
    return 1.0


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def first_step(kind: str, weight: float, gradient: float) -> float:
    """Where a weight of a 1 x 1 matrix is after one step."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weight)
    model.weight.grad = torch.full((1, 1), gradient)
    build_optimizer(model, params(kind), everywhere).step()
    return model.weight.item()


def sign(value: float) -> float:
    return math.copysign(1.0, value)


@pytest.mark.parametrize("weight, gradient", [(2.0, 0.5), (-1.0, 3.0), (0.5, -0.25)])
def test_first_steps_are_those_worked_by_hand(weight: float, gradient: float) -> None:
    decayed, with_decay = weight * (1 - RATE * DECAY), gradient + DECAY * weight
    expected = {
        "sgd": weight - RATE * 1.9 * with_decay,  # the gradient, and 0.9 of a momentum that is the gradient
        "adam": weight - RATE * sign(with_decay),  # both means are those of one gradient: g / |g|
        "adamw": decayed - RATE * sign(gradient),
        "adabelief": decayed - RATE * sign(gradient) / 0.9,  # the surprise is what the mean has not followed: 0.9 g
        "adafactor": decayed - RATE * abs(weight) * sign(gradient),  # relative to the weights; g / |g| is not clipped
        "lion": decayed - RATE * sign(gradient),
    }
    assert {kind: first_step(kind, weight, gradient) for kind in expected} == pytest.approx(expected, abs=1e-5)


def test_sgd_without_momentum_follows_the_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    model.weight.grad = torch.full((1, 1), 2.0)
    build_optimizer(model, params("sgd", betas=[0.0], weight_decay=0.0), everywhere).step()
    assert model.weight.item() == pytest.approx(1.0 - RATE * 2.0)


def lion_by_the_paper(weight: float, gradients: list[float]) -> float:
    momentum = 0.0
    for gradient in gradients:
        update = sign(0.9 * momentum + 0.1 * gradient)
        weight -= RATE * (update + DECAY * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    return weight


def adabelief_by_the_paper(weight: float, gradients: list[float]) -> float:
    mean = surprise = 0.0
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        surprise = 0.999 * surprise + 0.001 * (gradient - mean) ** 2 + 1e-16
        weight -= RATE * DECAY * weight
        weight -= RATE * (mean / (1 - 0.9**step)) / (math.sqrt(surprise / (1 - 0.999**step)) + 1e-16)
    return weight


@pytest.mark.parametrize("kind, by_the_paper", [("lion", lion_by_the_paper), ("adabelief", adabelief_by_the_paper)])
def test_further_steps_are_those_of_the_paper(kind: str, by_the_paper: Callable[[float, list[float]], float]) -> None:
    gradients = [0.5, -2.0, 1.0, 0.3, -0.1, 0.7]
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.5)
    optimizer = build_optimizer(model, params(kind), everywhere)
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    assert model.weight.item() == pytest.approx(by_the_paper(1.5, gradients), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_solves_a_convex_problem(kind: str) -> None:
    torch.manual_seed(1)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    inputs, wanted = torch.randn(64, 4), torch.randn(4, 4)
    targets = inputs @ wanted.T + 0.5
    optimizer = build_optimizer(model, params(kind, weight_decay=0.0), everywhere)
    losses = []
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / 400) * (0.2 if kind == "sgd" else 1.0)
        loss = (model.layers[0](inputs) - targets).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_optimizer_with_the_state_goes_on_with_the_same_bits(kind: str) -> None:
    whole, resumed = Layered(), Layered()
    one, other = (build_optimizer(model, params(kind), everywhere) for model in (whole, resumed))
    for step in range(6):
        fill_gradients(whole, step)
        fill_gradients(resumed, step)
        one.step()
        other.step()
        if step == 2:
            state = other.state_dict()
            assert all(
                isinstance(value, torch.Tensor) for entry in state["state"].values() for value in entry.values()
            )  # what safetensors can hold, and all that a resumed run is given
            other = build_optimizer(resumed, params(kind), everywhere)
            other.load_state_dict({**other.state_dict(), "state": state["state"]})
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    if kind != "sgd":  # whose momentum is no more telling than its weights
        fresh = Layered()
        fresh.load_state_dict(whole.state_dict())
        fill_gradients(fresh, 9)
        fill_gradients(whole, 9)
        one.step()
        build_optimizer(fresh, params(kind), everywhere).step()
        assert not torch.equal(fresh.layers[0].weight, whole.layers[0].weight)  # the state matters


def test_grouped_adamw_steps_with_the_bits_of_one_group_a_parameter() -> None:
    scales = {"layers.0.weight": 0.5, "layers.0.bias": 0.5}
    model, reference = Layered(), Layered()
    optimizer = build_optimizer(model, params("adamw"), lambda name: scales.get(name, 1.0))
    groups = [
        {"params": [parameter], "weight_decay": DECAY if parameter.ndim > 1 else 0.0, "lr": RATE * scales.get(name, 1)}
        for name, parameter in reference.named_parameters()
    ]
    single = torch.optim.AdamW(groups, fused=True)
    for step in range(8):
        fill_gradients(model, step)
        fill_gradients(reference, step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["scale"]
        optimizer.step()
        single.step()
    assert len(optimizer.param_groups) == 4 < len(groups)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), reference.parameters(), strict=True))


def test_groups_share_rate_and_decay_and_know_their_names() -> None:
    model = Layered()
    model.head.requires_grad_(False)
    optimizer = build_optimizer(model, params("adamw"), lambda name: 0.5 if name.startswith("embedding") else 1.0)
    found = {(group["scale"], group["weight_decay"]): group["param_names"] for group in optimizer.param_groups}
    assert found == {
        (0.5, DECAY): ["embedding.weight"],
        (1.0, DECAY): ["layers.0.weight", "layers.1.weight"],
        (1.0, 0.0): ["layers.0.bias", "layers.1.bias", "norm.weight", "norm.bias"],
    }


def test_a_tied_weight_is_in_one_group() -> None:
    model = Layered()
    model.head = nn.Linear(6, 5)
    model.head.weight = model.embedding.weight
    names = [name for group in grouped(model.named_parameters(), DECAY, everywhere) for name, _ in group["params"]]
    assert "embedding.weight" in names
    assert "head.weight" not in names


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_steps_along_the_singular_vectors_with_equal_lengths(shape: tuple[int, int]) -> None:
    rows, columns = shape
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(columns, rows, bias=False)])
    weight = model.layers[0].weight
    weight.data.zero_()
    left, _ = torch.linalg.qr(torch.randn(rows, min(shape), generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(columns, min(shape), generator=torch.Generator().manual_seed(1)))
    gradient = left @ torch.diag(torch.linspace(1.0, 3.0, min(shape))) @ right.T
    weight.grad = gradient.clone()
    build_optimizer(model, params("muon"), everywhere).step()
    step = -weight.detach() / (RATE * 0.2 * math.sqrt(max(shape)))  # 2502.16982, equation 4
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    in_its_axes = u.T @ step @ v.T
    # Newton-Schulz of five steps ends between 0.7 and 1.2, in bfloat16.
    assert in_its_axes.diagonal().min() > 0.65
    assert in_its_axes.diagonal().max() < 1.25
    assert (in_its_axes - torch.diag(in_its_axes.diagonal())).abs().max() < 0.03
    assert (step - u @ in_its_axes @ v).abs().max() < 0.03


def test_muon_leaves_all_but_hidden_matrices_to_adamw() -> None:
    model, reference = Layered(), Layered()
    optimizer = build_optimizer(model, params("muon"), everywhere)
    adamw = build_optimizer(reference, params("adamw"), everywhere)
    assert isinstance(optimizer, MuonAndAdamW)
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(reference, step)
        optimizer.step()
        adamw.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) == (name not in {"layers.0.weight", "layers.1.weight"}), name


def test_muon_works_where_nothing_but_matrices_is_trained() -> None:
    model = Layered()
    model.requires_grad_(False)
    model.layers[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, params("muon"), everywhere)
    before = model.layers[0].weight.detach().clone()
    fill_gradients(model, 0)
    optimizer.step()
    assert not torch.equal(model.layers[0].weight, before)


def test_muon_is_refused_without_hidden_matrices() -> None:
    with pytest.raises(UserError, match=r"optimizer.kind: muon is for matrices of hidden layers.*use adamw") as caught:
        build_optimizer(nn.Linear(4, 4), params("muon"), everywhere)
    assert "\n" not in str(caught.value)


def test_hidden_matrices_of_known_architectures() -> None:
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=16, max_position_embeddings=16))
    layer = "bert.encoder.layer.0."
    assert hidden_matrices(bert) == {
        f"{layer}attention.self.query.weight", f"{layer}attention.self.key.weight",
        f"{layer}attention.self.value.weight", f"{layer}attention.output.dense.weight",
        f"{layer}intermediate.dense.weight", f"{layer}output.dense.weight",
    }  # fmt: skip
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    assert hidden_matrices(gpt) == {
        f"transformer.h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    found = hidden_matrices(t5)
    assert len(found) == 4 + 2 + 8 + 2  # encoder: attention, feed-forward; decoder: two attentions, feed-forward
    assert not [name for name in found if "bias" in name or "shared" in name or "lm_head" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_betas_that_do_not_fit_the_kind_are_refused(kind: str) -> None:
    values = {**params(kind).model_dump(), "betas": [*BETAS[kind], 0.5]}
    with pytest.raises(
        ValueError, match=rf"betas: {kind} takes (none|{len(BETAS[kind])}).*; got {len(BETAS[kind]) + 1}"
    ):
        OptimizerParams.model_validate(values)

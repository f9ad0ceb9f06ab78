"""fp16 with its loss scaling on the CPU, and `auto` as the fingerprint records it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from stages.core import hardware
from stages.core.params import OptimizerParams, load_params
from stages.core.training.optimizers import build_optimizer
from stages.core.training.precision import autocast, build_accelerator, clip_gradients, resolve_precision

FIRST_SCALE = 65536.0
PARAMS = load_params(Path(__file__).parents[4] / "presets" / "tiny.yaml").finetune.optimizer


def layered() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    return model


def params(kind: str, betas: list[float]) -> OptimizerParams:
    return PARAMS.model_copy(update={"kind": kind, "betas": betas, "precision": "fp16"})


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def _step(accelerator: Any, optimizer: torch.optim.Optimizer, weights: Any, maximum_norm: float) -> None:
    clip_gradients(accelerator, optimizer, weights, maximum_norm)
    accelerator.scaler.step(optimizer)
    accelerator.scaler.update()


@pytest.mark.parametrize("overflow_at", [0, 2])
@pytest.mark.parametrize(
    "kind, betas",
    [("sgd", [0.9]), ("adamw", [0.9, 0.999]), ("adabelief", [0.9, 0.999]), ("lion", [0.9, 0.99]), ("adafactor", []),
     ("muon", [0.95, 0.9, 0.999])],
)  # fmt: skip
def test_an_overflow_leaves_out_the_step_and_halves_the_scale(kind: str, betas: list[float], overflow_at: int) -> None:
    model, undisturbed = layered(), layered()
    accelerator = build_accelerator("fp16")
    scaler = accelerator.scaler
    optimizers = [build_optimizer(one, params(kind, betas), lambda name: 1.0) for one in (model, undisturbed)]

    def step(number: int, factor: float = 1.0) -> None:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        for one, optimizer in zip((model, undisturbed), optimizers, strict=True):
            if one is undisturbed and factor != 1.0:
                continue
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(one.layers[0](inputs).square().mean() * factor)
            accelerator.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            accelerator.scaler.step(optimizer)
        accelerator.scaler.update()

    for number in range(overflow_at):
        step(number)
    before = weights_of(model)
    assert scaler.get_scale() == FIRST_SCALE
    step(8, factor=1e38)  # times the scale, more than fp32 holds
    assert torch.equal(weights_of(model), before)
    assert scaler.get_scale() == FIRST_SCALE / 2
    step(9)
    # No trace of the step left out, in means or counts of steps: powers of two scale without rounding.
    assert torch.equal(weights_of(model), weights_of(undisturbed))
    assert not torch.equal(weights_of(model), before)
    assert scaler.get_scale() == FIRST_SCALE / 2


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    accelerator = build_accelerator("fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator.backward(model(torch.full((1, 1), 0.25)).sum())
    _step(accelerator, optimizer, model.parameters(), 1.0)
    assert model.weight.item() == pytest.approx(-0.25)  # and not -1, the clipped 0.25 * 65,536
    optimizer.zero_grad()
    accelerator.backward(model(torch.full((1, 1), 4.0)).sum())
    _step(accelerator, optimizer, model.parameters(), 1.0)
    assert model.weight.item() == pytest.approx(-1.25, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_scaled_in_formats_with_the_range_of_fp32(precision: Any) -> None:
    accelerator = build_accelerator(precision)
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(weight * 3.0)
    assert weight.grad is not None
    assert weight.grad.item() == 3.0
    assert accelerator.scaler.state_dict() == {}
    weight.grad.fill_(float("inf"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    _step(accelerator, optimizer, [weight], 1.0)
    assert weight.isnan()  # the loop's own checks must see it


def test_a_small_transformer_learns_in_fp16_on_the_cpu() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    seen: list[torch.dtype] = []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    accelerator = build_accelerator("fp16")
    optimizer = build_optimizer(model, PARAMS, lambda name: 1.0)
    tokens = torch.randint(3, 30, (24, 8))
    labels = tokens[:, 1] % 3
    losses = []
    for _ in range(30):
        optimizer.zero_grad(set_to_none=True)
        with autocast("fp16"):
            loss = model(input_ids=tokens, labels=labels).loss
        accelerator.backward(loss)
        _step(accelerator, optimizer, model.parameters(), 1.0)
        losses.append(loss.item())
    assert set(seen) == {torch.float16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert losses[-1] < 0.3 * losses[0]


def test_auto_is_what_the_facts_of_the_machine_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "describe_cpu", lambda: {"features": ["avx2"]})
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(hardware, "list_gpus", lambda: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"  # what is asked for is taken
    monkeypatch.setattr(hardware, "list_gpus", lambda: [{"compute_capability": "7.5"}])
    assert resolve_precision("auto") == "fp16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_products_of_fp32_are_tf32_and_fp16_is_scaled_by_accelerate() -> None:
    accelerator = build_accelerator("fp16")
    assert torch.get_float32_matmul_precision() == "high"
    assert accelerator.scaler.is_enabled()
    assert hardware.training_gpus()

from pathlib import Path

import pytest
import torch

from stages.core.checkpoints import load_model
from stages.finetune.__main__ import layer_scale
from stages.finetune.adversarial import add_adversarial_gradients, perturbed_embeddings


def test_layers_further_down_learn_slower() -> None:
    assert layer_scale("classifier.weight", layers=2, decay=0.5) == 1.0
    assert layer_scale("bert.encoder.layer.1.output.dense.weight", 2, 0.5) == 0.5
    assert layer_scale("bert.encoder.layer.0.output.dense.weight", 2, 0.5) == 0.25
    assert layer_scale("bert.embeddings.word_embeddings.weight", 2, 0.5) == 0.125
    assert layer_scale("bert.embeddings.word_embeddings.weight", 2, 1.0) == 1.0


def test_the_perturbation_has_the_asked_length_and_goes_away(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, 0].backward()
    with perturbed_embeddings(model, epsilon=0.3):
        assert (weight - before).norm().item() == pytest.approx(0.3, rel=1e-4)
    assert torch.equal(weight, before)


def test_it_raises_the_loss_and_adds_gradients(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    losses: list[float] = []

    def backward() -> None:
        loss = torch.nn.functional.cross_entropy(model(input_ids=torch.tensor([[5, 6, 7]])).logits, torch.tensor([0]))
        losses.append(loss.item())
        loss.backward()

    backward()
    clean = model.classifier.weight.grad.clone()
    add_adversarial_gradients(model, 0.5, backward)
    assert losses[1] > losses[0]
    assert not torch.equal(model.classifier.weight.grad, clean)

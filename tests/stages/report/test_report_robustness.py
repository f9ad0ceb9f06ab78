"""The report's part about changed texts, other domains and foreign texts."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.core.ladder import TITLES, points
from stages.core.params import Params, load_params
from stages.report import sections
from stages.report.drawing import inline, settle, style
from stages.report.sections.robustness import Cell, section

PRESET = Path(__file__).parents[3] / "presets" / "tiny.yaml"


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(PRESET)


def perturbation(drop: float, extra: float = 0.0, sure: bool = False) -> dict[str, Any]:
    return {
        "strength": 0.2, "changed": 0.7, "accuracy": 0.95 - drop, "drop": drop, "worst_case": 0.9 - drop,
        "consistency": 0.9, "drop_low": drop - 0.02, "drop_high": drop + 0.02, "reference_accuracy": 0.95,
        "reference_drop": 0.0, "reference_worst_case": 0.95, "extra_drop": extra, "extra_low": extra - 0.01,
        "extra_high": extra + 0.01, "hurts_more": sure,
    }  # fmt: skip


def findings(variant: str, **changes: Any) -> dict[str, Any]:
    area = {"auroc": 0.91, "low": 0.88, "high": 0.94}
    place = {"texts": 300, "accuracy": 0.95, "low": 0.92, "high": 0.97, "reference_accuracy": 0.96,
             "difference": -0.01, "difference_low": -0.02, "difference_high": 0.0}  # fmt: skip
    found: dict[str, Any] = {
        "variant": variant, "texts": 300, "copies": 3, "confidence": 0.95, "accuracy": 0.95,
        "reference_accuracy": 0.96, "mean_accuracy": 0.9, "worst_perturbation": "typos", "worst_accuracy": 0.85,
        "right_everywhere": 0.45,
        "perturbations": {"typos": perturbation(0.1), "upper_case": perturbation(-0.01)},
        "sensitivity": {}, "shift": {"test": place},
        "out_of_distribution": {"corpus": {"texts": 300, "max_probability": area, "energy": area}},
    }  # fmt: skip
    return found | changes


def write(folder: Path, variant: str, examples: list[list[Any]] | None = None, **changes: Any) -> dict[str, Path]:
    own = folder / variant
    own.mkdir()
    (own / "metrics.json").write_text(json.dumps(findings(variant, **changes)))
    columns = ["perturbation", "text", "perturbed", "label", "prediction", "confidence"]
    pandas.DataFrame(examples or [], columns=columns).to_parquet(own / "examples.parquet")
    return {f"robustness@{variant}": own}


def rendered(found: sections.Section) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(sections.__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(
        percent=lambda share: f"{share:.1%}",
        points=points,
        whole=lambda value: f"{value:,.0f}",
        title=lambda name: TITLES.get(name, name),
    )
    with style("draw"):
        settle(found.figures["robustness"])
    drawn = Markup(inline(found.figures["robustness"], "robustness", found.descriptions["robustness"]))
    page = environment.get_template("robustness.html").render({**found.context, "pictures": {"robustness": drawn}})
    check = HTMLParser()
    check.feed(page)
    check.close()
    return " ".join(page.split())


def test_without_the_stage_there_is_no_section(params: Params) -> None:
    assert section({"clean": Path("nowhere")}, params) is None


def test_a_model_that_loses_no_more_raises_no_alarm(tmp_path: Path, params: Params) -> None:
    found = section({**write(tmp_path, "finetune"), **write(tmp_path, "quantize")}, params)
    assert found is not None
    assert not found.alarm
    assert found.summary == (
        "Over 2 ways to change a text the quantized model is right on 90.0% (95.0% on clean texts), least under "
        "typos, 85.0%; under none does it surely lose more than the fine-tuned model."
    )
    page = rendered(found)
    assert "more than fine-tuned" not in page
    assert "45.0% of the texts are answered rightly in all 6 changed copies and unchanged." in page
    assert 'data-value="0.91">0.910<small>0.880 to 0.940</small>' in page
    assert "The same task elsewhere" not in page
    legend = found.figures["robustness"].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["quantized", "fine-tuned"]


def test_a_model_that_surely_loses_more_is_an_alarm_that_names_the_perturbation(tmp_path: Path, params: Params) -> None:
    broken = {"upper_case": perturbation(0.3, 0.25, True), "typos": perturbation(0.1)}
    inputs = {**write(tmp_path, "finetune"), **write(tmp_path, "quantize", perturbations=broken)}
    found = section(inputs, params)
    assert found is not None
    assert found.alarm
    assert found.summary.endswith("it surely loses more than the fine-tuned model under upper case, +25.0 points under "
                                  "upper case.")  # fmt: skip
    page = rendered(found)
    assert "Compression made the model more fragile" in page
    assert "upper case (+25.0 points, +24.0 to +26.0)" in page
    assert page.count("more than fine-tuned</span>") == 1
    assert found.context["rows"][0].name == "upper case"
    # Another variant that loses more is marked in the table, and no alarm: it is not what gets deployed.
    (tmp_path / "other").mkdir()
    inputs = {**write(tmp_path / "other", "distill", perturbations=broken), **write(tmp_path / "other", "quantize")}
    other = section(inputs, params)
    assert other is not None
    assert not other.alarm
    assert "more than fine-tuned</span>" in rendered(other)


def test_cells_darken_with_the_loss() -> None:
    assert [Cell(0.9, drop, False).heat for drop in (-0.1, 0.0, 0.05, 0.2, 0.6)] == [0, 0, 25, 100, 100]


def test_domains_sensitivity_and_examples_are_shown(tmp_path: Path, params: Params) -> None:
    place = findings("x")["shift"]["test"]
    changing = {
        "negation": {"strength": 1.0, "changed": 0.8, "answers_changed": 0.123, "reference_answers_changed": 0.2}
    }
    reason = {"reason": "there is no foreign text"}
    examples = [["typos", f"text <{number}>", "txet", "yes", "no", 0.9] for number in range(4)]
    changes = {"shift": {"amazon": place, "test": place, "tweets": place}, "out_of_distribution": reason}
    found = section(write(tmp_path, "quantize", examples, sensitivity=changing, **changes), params)
    assert found is not None
    page = rendered(found)
    assert '<th scope="row">tweets</th><td>quantized</td>' in page
    assert "Negation, which alters 80.0% of the copies: 12.3% of the answers change;" in page
    assert [row["domain"] for row in found.context["shift"]] == ["test", "amazon", "tweets"]
    assert "Not measured: there is no foreign text." in page
    assert page.count("text &lt;") == 2


def test_a_cascade_has_no_energy(tmp_path: Path, params: Params) -> None:
    area = {"auroc": 0.8, "low": 0.7, "high": 0.9}
    foreign = {"corpus": {"texts": 10, "max_probability": area, "energy": {"reason": "two models"}}}
    found = section({**write(tmp_path, "cascade", out_of_distribution=foreign), **write(tmp_path, "finetune")}, params)
    assert found is not None
    assert [row["energy"] is None for row in found.context["detection"]] == [False, True]
    assert '<td class="number" data-value="">–</td>' in rendered(found)
    assert found.context["final"] == "finetune"
    assert found.summary.endswith("85.0%.")


def test_nothing_to_perturb_is_said(tmp_path: Path, params: Params) -> None:
    bare = findings("quantize", perturbations={})
    for name in ("mean_accuracy", "worst_perturbation", "worst_accuracy"):
        del bare[name]
    folder = write(tmp_path, "quantize")
    (folder["robustness@quantize"] / "metrics.json").write_text(json.dumps(bare))
    found = section(folder, params)
    assert found is not None
    assert found.summary == "No perturbation that keeps the label was tried."
    assert "Every model under every change" not in rendered(found)

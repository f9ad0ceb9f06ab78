"""The parts of the page on cost and on slices, each rendered by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import read_json, write_json
from stages.core.ladder import TITLES, VARIANTS, points, rate
from stages.core.params import Params, load_params
from stages.evaluate.slices import Grouping, judge_slices, summarize_slices
from stages.report.drawing import inline, settle, style
from stages.report.sections import Section, cost, slices

REPOSITORY = Path(__file__).parents[3]
GAP = {
    "value": 0.08,
    "low": 0.05,
    "high": 0.2,
    "reference": 0.06,
    "change": 0.02,
    "change_low": 0.01,
    "change_high": 0.04,
}
COST = {
    "operations": {"per_text": 1.037e8, "int8": 1.0e8, "tokens": 13.6},
    "ceilings": {"fp32": 200.0, "bf16": 764.0, "int8": 1677.0, "share": 0.36},
    "cold_start": {"seconds": 1.25, "low": 1.2, "high": 1.4, "starts": 3, "parts": {}},
    "energy_joules_per_thousand_texts": None,
}


@pytest.fixture
def params() -> Params:
    return load_params(REPOSITORY / "params.yaml")


@pytest.fixture
def inputs(project: Path) -> dict[str, Path]:
    """Outputs of evaluate as it leaves them, with cost and slices."""
    folders = {f"evaluate@{name}": project / "artifacts/evaluate" / name for name in VARIANTS}
    for number, folder in enumerate(folders.values()):
        add_cost(folder, speed=1000.0 * (number + 1))
        add_slices(folder, broken=0)
    return folders


def change(folder: Path, **parts: Any) -> None:
    metrics = read_json(folder / "metrics.json")
    metrics["best"] |= parts.pop("best", {})
    write_json(folder / "metrics.json", metrics | parts)


def add_cost(folder: Path, speed: float, **changes: Any) -> None:
    change(folder, cost=COST | changes, best={"resident_memory_mb": 300.4})
    shares = numpy.array([0.1, 0.5, 0.9, 1.0])
    latency = pandas.DataFrame({"contender": "openvino-cpu", "share": shares, "milliseconds": 1.0 + shares})
    latency.to_csv(folder / "latency.csv", index=False)
    for file in ("throughput_batch.csv", "throughput_length.csv"):
        rows = [(size, size * 1.1, speed / size, 1.0, speed) for size in (8, 32)]
        table = pandas.DataFrame(rows, columns=["size", "tokens", "texts_per_second", "low", "high"])
        table.to_csv(folder / file, index=False)


def add_slices(folder: Path, broken: int) -> None:
    """Slices of 300 texts by country, of which the model lost `broken` of those from NA."""
    groups = numpy.array(["NA", "<b>", "rare"] * 100, dtype=object)
    groups[groups == "rare"] = ["rare"] * 5 + ["fr"] * 95
    labels = numpy.zeros(300, dtype=int)
    variant = labels.copy()
    variant[numpy.flatnonzero(groups == "NA")[:broken]] = 1
    grouping = Grouping("column", "country", groups, ("NA", "<b>", "rare", "fr"))
    table = judge_slices([grouping], variant, labels, labels, 10, 0.95)
    table.to_csv(folder / "slices.csv", index=False)
    fairness = {"column country": {"groups": 3, "accuracy": GAP}}
    change(folder, slices=summarize_slices(table), fairness=fairness)


def render(found: Section) -> HTMLParser:
    environment = Environment(
        loader=FileSystemLoader(Path(cost.__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: f"{share:.1%}",
        points=points,
        rate=rate,
        number=lambda value: "–" if value is None else f"{value:g}",
        mib=lambda size: f"{size / 2**20:,.1f}",
        millions=lambda count: f"{count / 1e6:,.1f}",
        whole=lambda value: f"{value:,.0f}",
        title=lambda name: TITLES.get(name, name),
    )
    with style("draw"):
        for figure in found.figures.values():
            settle(figure)
    pictures = {name: Markup(inline(figure, name, found.descriptions[name])) for name, figure in found.figures.items()}
    page = environment.get_template(f"{found.identifier}.html").render(pictures=pictures, **found.context)
    return HTMLParser(f"<section>{page}</section>")


def rows_of(html: HTMLParser, caption: str) -> list[list[str]]:
    table = next(each for each in html.css("table") if caption in (each.css_first("caption").text() or ""))
    return [[" ".join(cell.text(separator=" ").split()) for cell in row.css("th, td")] for row in table.css("tr")]


def test_the_cost_of_every_model_is_told(inputs: dict[str, Path], params: Params) -> None:
    found = cost.section(inputs, params)
    assert found is not None
    assert found.summary == (
        "The quantized model answers its first text 1.2 s after its process starts and then holds 300 MiB; "
        "it uses 36% of what this machine multiplies at most."
    )
    assert not found.alarm
    html = render(found)
    rows = rows_of(html, "costs to run")
    assert [row[0] for row in rows[1:]] == [TITLES[name] for name in VARIANTS]
    assert rows[4][2:6] == ["3,560", "1.25 1.20 to 1.40", "412", "300"]
    assert rows[4][8:] == ["103.7 96.4% in int8", "36.0%"]
    text = html.text()
    assert "this machine does not tell how much it takes" in text
    assert "evaluate.cost.price_per_hour is null" in text
    assert "200 billion operations a second in fp32, 764 in bf16, 1,677 in int8" in text
    assert len(html.css("svg")) == 4


def test_price_and_energy_are_told_where_they_are_known(inputs: dict[str, Path], params: Params) -> None:
    for folder in inputs.values():
        known = {"price_per_million_texts": 0.031, "energy_joules_per_thousand_texts": 12.5}
        add_cost(folder, 1000.0, **known)
    own = params.evaluate.cost.model_copy(update={"price_per_hour": 0.4})
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"cost": own})})
    found = cost.section(inputs, params)
    assert found is not None
    html = render(found)
    rows = rows_of(html, "costs to run")
    assert rows[0][-2:] == ["Joules per 1,000 texts", "Price of a million texts"]
    assert rows[1][-2:] == ["12.5", "0.031"]
    assert "0.4 an hour" in html.text()


def test_without_a_ceiling_none_is_drawn(inputs: dict[str, Path], params: Params) -> None:
    for folder in inputs.values():
        add_cost(folder, 1000.0, ceilings={"share": None})
    found = cost.section(inputs, params)
    assert found is not None
    assert "cost_ceiling" not in found.figures
    assert rows_of(render(found), "costs to run")[1][-1] == "not measured"


def test_a_slice_made_worse_raises_the_alarm(inputs: dict[str, Path], params: Params) -> None:
    add_slices(inputs["evaluate@quantize"], broken=15)
    found = slices.section(inputs, params)
    assert found is not None
    assert found.alarm
    assert found.summary == (
        "The quantized model got worse on country: NA (−15.0 points), by more than chance explains; "
        "3 slices were judged."
    )
    html = render(found)
    rows = rows_of(html, "Every slice")
    assert rows[1][:2] == ["country: NA", "100"]
    assert rows[1][4].startswith("−15.0")
    assert rows[1][5:] == ["15 / 0", "0.000", "hurt"]
    assert [row[0] for row in rows[2:]] == ["country: <b>", "country: fr", "country: rare"]
    assert rows[4][-1] == "too few texts"
    assert ["quantized", "4", "3", "1", "country: NA", "−15.0"] in rows_of(html, "summed up")
    assert rows_of(html, "Gaps between")[1][:2] == ["column country", "accuracy"]


def test_slices_without_a_loss_raise_none(inputs: dict[str, Path], params: Params) -> None:
    found = slices.section(inputs, params)
    assert found is not None
    assert not found.alarm
    assert found.summary.startswith("On none of the 3 slices judged did the quantized model lose more than chance")


def test_a_model_that_is_not_deployed_raises_no_alarm_but_is_told(inputs: dict[str, Path], params: Params) -> None:
    add_slices(inputs["evaluate@distill"], broken=15)
    found = slices.section(inputs, params)
    assert found is not None
    assert not found.alarm
    assert ["distilled", "4", "3", "1", "country: NA", "−15.0"] in rows_of(render(found), "summed up")


def test_where_nothing_was_measured_there_is_no_section(project: Path, params: Params) -> None:
    folders = {f"evaluate@{name}": project / "artifacts/evaluate" / name for name in VARIANTS}
    assert cost.section(folders, params) is None
    assert slices.section(folders, params) is None
    assert cost.section({}, params) is None

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
from report_reading import REPOSITORY, inputs, words
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import file_sha256, verify
from stages.core.ladder import VARIANTS, ladder_rows
from stages.core.params import Params, load_params
from stages.report import page as frame
from stages.report.drawing import inline, new_figure, save, style
from stages.report.page import render, settled
from stages.report.sections import Section

_MOST_BYTES = 3_000_000


@pytest.fixture
def html(page: str) -> HTMLParser:
    return HTMLParser(page)


def test_the_page_opens_offline_and_runs_only_its_own_script(page: str, html: HTMLParser) -> None:
    assert not html.css("link, iframe, object")
    assert len(html.css("script")) == 1
    assert html.css_first("script").attributes == {}
    policy = html.css_first("meta[http-equiv=Content-Security-Policy]").attributes["content"] or ""
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    targets = [node.attributes.get("href") or node.attributes.get("xlink:href") for node in html.css("[href], use")]
    assert all(target is None or target.startswith("#") for target in targets)
    # Namespaces are the only addresses in the page.
    assert set(re.findall(r"https?://[^\"'\s)<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page
    assert len(page.encode()) < _MOST_BYTES


def test_the_contents_quote_every_section(html: HTMLParser) -> None:
    links = [node.attributes["href"] for node in html.css("nav.contents a")]
    sections = [node.attributes["id"] for node in html.css("main section")]
    assert links == [f"#{name}" for name in sections]
    elsewhere = {"cost", "slices", "robustness", "explanations"}  # the made-up project has none of their inputs
    assert sections == [name for name in frame.SECTIONS if name not in elsewhere]
    assert all(node.text().strip() for node in html.css("nav.contents span"))


def test_no_path_of_this_machine_is_told(page: str, finished_project: Path) -> None:
    assert str(finished_project) not in page
    assert str(Path.home()) not in page


def test_the_page_can_be_read_without_seeing_it(page: str, html: HTMLParser) -> None:
    assert html.css_first("html").attributes["lang"] == "en"
    levels = [int(node.tag[1]) for node in html.css("h1, h2, h3, h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for picture in html.css("svg"):
        assert picture.attributes["role"] == "img"
        assert len(picture.attributes["aria-label"] or "") > 20
    for table in html.css("table"):
        assert table.css_first("caption") is not None
        assert table.parent is not None
        assert "box" in (table.parent.attributes.get("class") or "")
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def made_up(identifier: str, **changes: Any) -> Section:
    return Section(identifier=identifier, title="Made up", summary="Of one sentence.", context={}, **changes)


def picture() -> Any:
    with style("draw"):
        figure = new_figure(3, 2)
        figure.subplots().plot([1, 2], [3, 4])
    return figure


def test_pictures_need_names_of_their_own_and_descriptions() -> None:
    one = made_up("ladder", figures={"same": picture()}, descriptions={"same": "a line"})
    other = made_up("pareto", figures={"same": picture()}, descriptions={"same": "a line"})
    with pytest.raises(ValueError, match="section pareto: another section has a picture same"):
        settled([one, other])
    with pytest.raises(ValueError, match="section ladder: no description of the picture silent"):
        settled([made_up("ladder", figures={"silent": picture()})])


@pytest.mark.parametrize("alarm", [True, False])
def test_an_alarm_is_named_in_the_verdict_and_linked(
    metrics: dict[str, dict[str, Any]], alarm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(REPOSITORY / "params.yaml")
    monkeypatch.setattr(frame, "_body", lambda environment, section: "")
    html = HTMLParser(render(ladder_rows(metrics), [made_up("training", alarm=alarm)], params))
    assert len(html.css(".verdict .alarms a[href='#training']")) == alarm
    assert ("Made up : Of one sentence." in words(html, ".alarms")) == alarm


def test_a_section_without_anything_to_tell_is_left_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full = ModuleType("empty"), ModuleType("full")

    def nothing(inputs: object, params: Params) -> None:
        return None

    def something(inputs: object, params: Params) -> Section:
        return made_up("training")

    monkeypatch.setattr(empty, "section", nothing, raising=False)
    monkeypatch.setattr(full, "section", something, raising=False)
    monkeypatch.setitem(sys.modules, "stages.report.sections.empty", empty)
    monkeypatch.setitem(sys.modules, "stages.report.sections.full", full)
    monkeypatch.setattr(frame, "SECTIONS", ("empty", "full"))
    found = frame.read_sections({}, load_params(Path("params.yaml")))
    assert [section.identifier for section in found] == ["training"]


@pytest.mark.parametrize("around", ["{}", '<div class="box" tabindex="0">\n{}\n</div>'])
def test_every_table_gets_one_box_with_the_name_of_its_caption(around: str) -> None:
    table = '<table class="sortable"><caption>Flips, "both" <b>ways</b></caption><tbody></tbody></table>'
    boxed = frame._TABLE.sub(frame._boxed, f"<p>a</p>{around.format(table)}<p>b</p>")
    name = 'aria-label="Flips, &quot;both&quot; ways"'
    assert boxed == f'<p>a</p><div class="box" tabindex="0" role="region" {name}>{table}</div><p>b</p>'


def test_pictures_are_the_same_bytes_twice_and_carry_no_date(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with style("t"):
            figure = new_figure(3, 2)
            figure.subplots().plot([1, 2], [3, 4])
        save(figure, tmp_path / folder, "picture")
    for name in ("picture.svg", "picture.png"):
        assert file_sha256(tmp_path / "one" / name) == file_sha256(tmp_path / "two" / name)
    assert "<dc:date>" not in (tmp_path / "one/picture.svg").read_text()


def test_inline_pictures_take_the_colours_of_the_page_and_keep_apart() -> None:
    with style("t"):
        figure = new_figure(3, 2)
        figure.subplots().plot([1, 2], [3, 4], color="#1f5fa6")
    svg = inline(figure, "first", 'with "quotes" & <more>')
    assert "var(--accent)" in svg
    assert "#1f5fa6" not in svg
    assert 'aria-label="with &quot;quotes&quot; &amp; &lt;more>"' in svg
    assert all(name.startswith("first-") for name in re.findall(r'\sid="([^"]+)"', svg))
    assert all(name.startswith("first-") for name in re.findall(r"url\(#([^)]+)\)", svg))


def test_the_stage_publishes_page_pictures_and_ladder(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [word for role, folder in inputs().items() for word in (f"--{role}", str(folder))]
    command = [sys.executable, "-m", "stages.report", *options, "--out", "artifacts/report"]
    done = subprocess.run(command, env=child_environment(), check=False)
    assert done.returncode == 0
    out = project / "artifacts/report"
    verify(out)
    names = {path.name for path in (out / "plots").iterdir()}
    assert {
        "ladder.png",
        "ladder.svg",
        "waterfall.png",
        "pareto_size.svg",
        "confusion.png",
        "quality_reliability.svg",
        "lengths.svg",
        "curves_prune.png",
    } <= names
    assert not any("narrow" in name for name in names)
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    ladder = json.loads((out / "ladder.json").read_text())
    table = pandas.read_csv(out / "ladder.csv")
    assert [row["name"] for row in ladder] == list(table["name"]) == ["naive PyTorch", "fair PyTorch", *VARIANTS]
    assert table.set_index("name").loc["quantize", "over_fair"] == pytest.approx(12.4)
    steps = pandas.read_csv(out / "waterfall.csv")
    assert steps["factor"].prod() == pytest.approx(12.4)
    assert list(steps["step"])[-1] == "quantization"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best"] == "quantize"
    assert metrics["throughput_over_naive"] == pytest.approx(378.2)
    assert "12.4×" in capfd.readouterr().err


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}

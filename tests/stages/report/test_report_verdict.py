from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_reading import change_metrics, page_of, table_after, words
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.ladder import VARIANTS, ladder_rows
from stages.report.verdict import reach_verdict


@pytest.fixture
def html(page: str) -> HTMLParser:
    return HTMLParser(page)


def test_the_answer_stands_first(html: HTMLParser) -> None:
    assert html.css_first("h1").text() == "12.4× as fast and 5.6× smaller, for 0.7 points of accuracy"
    lead = html.css_first(".lead").text()
    for fact in ("3,560 texts a second", "12.4× the fair", "378× the naive", "−1.9 to +0.4", "5.6× smaller"):
        assert fact in lead
    assert [node.text() for node in html.css(".tiles dd:not(.span)")] == ["12.4×", "378×", "−0.7", "5.6×"]
    assert [node.text() for node in html.css(".tiles .span")] == [
        "11.8× to 13.1×, rounds", "359× to 401×, rounds", "−1.9 to +0.4, 95% interval", "exact",
    ]  # fmt: skip


def test_a_model_below_the_floor_is_marked_and_never_the_answer(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    against = json.loads((folder / "metrics.json").read_text())["against_reference"]
    change_metrics(folder, against_reference=against | {"within_floor": False, "difference": -0.03})
    html = HTMLParser(page_of("ladder"))
    rows = table_after(html, "Quality, speed and size")[1:]
    assert rows[5][2] == "below"
    assert rows[4][0] == "pruned fastest within the floor"
    assert html.css_first("h1").text().startswith("9.9× as fast")


def test_when_no_model_meets_the_floor_the_page_says_so(project: Path) -> None:
    for name in VARIANTS:
        folder = project / "artifacts/evaluate" / name
        against = json.loads((folder / "metrics.json").read_text())["against_reference"]
        change_metrics(folder, against_reference=against | {"within_floor": False})
    html = HTMLParser(page_of("ladder"))
    assert html.css_first("h1").text() == "No model meets the quality floor"
    assert not html.css(".tiles dd")
    assert "lost more than the 1.0 points" in words(html, "#floor.bad")
    assert html.css_first("#unseen") is None


def test_the_verdict_says_how_surely_the_floor_is_met(metrics: dict[str, dict[str, object]]) -> None:
    crossing = reach_verdict(ladder_rows(metrics), 0.01)
    assert crossing.sure is False
    assert crossing.floor.startswith(
        "Meets the floor of −1.0 points by its estimate. Its interval reaches down to −1.9"
    )
    sure = reach_verdict(ladder_rows(metrics), 0.02)
    assert sure.sure is True
    assert sure.floor == "Meets the floor of −2.0 points, and so does its whole interval."


def test_what_the_test_could_not_show_is_told(metrics: dict[str, dict[str, object]]) -> None:
    told = reach_verdict(ladder_rows(metrics), 0.01).unseen
    assert told is not None
    assert "below 1.8 points of accuracy would have gone unseen" in told
    assert told.endswith("coarser than the floor of 1.0.")
    assert "finer than the floor of 5.0" in str(reach_verdict(ladder_rows(metrics), 0.05).unseen)


def test_models_that_never_differ_prove_nothing_about_other_texts(metrics: dict[str, dict[str, object]]) -> None:
    against = metrics["quantize"]["against_reference"]
    assert isinstance(against, dict)
    metrics["quantize"]["against_reference"] = against | {"difference": 0.0, "low": 0.0, "high": 0.0}
    verdict = reach_verdict(ladder_rows(metrics), 0.01)
    assert "No test text tells the two models apart" in str(verdict.unseen)
    assert verdict.answer.endswith("at no loss of accuracy")

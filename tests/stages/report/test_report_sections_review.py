"""The sections `review` and `progress`, rendered alone."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pandas
import pytest
from markupsafe import Markup
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import write_json
from stages.core.champions import CHAMPIONS, Champion, digest_of_test_split, read_champions, write_champions
from stages.core.errors import UserError
from stages.core.params import Params, load_params
from stages.core.tables import frame_of, write_table
from stages.report.drawing import inline
from stages.report.page import _environment
from stages.report.sections import Section, progress, review

COLUMNS = ["key", "split", "text", "label", "why", "correction"]


def rendered(section: Section | None) -> HTMLParser:
    assert section is not None
    pictures = {
        name: Markup(inline(figure, name, section.descriptions[name])) for name, figure in section.figures.items()
    }
    template = _environment().get_template(f"sections/{section.identifier}.html")
    return HTMLParser(template.render(**section.context, pictures=pictures))


def words(html: HTMLParser) -> str:
    return " ".join((html.body or html.root).text(separator=" ").split())  # type: ignore[union-attr]


@pytest.fixture
def params(project: Path) -> Params:
    return load_params(project / "params.yaml")


@pytest.fixture
def inputs(project: Path) -> dict[str, Path]:
    artifacts = project / "artifacts"
    for name in ("review", "history"):
        shutil.rmtree(artifacts / name, ignore_errors=True)
        (artifacts / name).mkdir()
    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["x", "y"]})
    frame.to_parquet(artifacts / "evaluate/quantize/predictions.parquet")
    inputs = {name: artifacts / name for name in ("clean", "deploy_check", "review", "history")}
    return inputs | {"evaluate@quantize": artifacts / "evaluate/quantize"}


def write_review(folder: Path, count: int) -> None:
    rows = [
        [str(number), "test", f"<b>text</b> {number}", "HUM", "The label is in doubt.", ""] for number in range(count)
    ]
    write_table(frame_of(COLUMNS, rows), folder / "review.csv")
    reasons = {"flip": 0, "label_doubt": count, "low_confidence": 0}
    by_split = {"train": 3, "validation": 1, "test": 2}
    metrics = {"texts": count, "reasons": reasons, "label_doubts": by_split}
    write_json(folder / "metrics.json", metrics | {"estimated_noise": {"train": 0.01, "validation": 0.0, "test": 0.02}})


def test_the_first_texts_to_look_at_are_shown_and_how_to_correct_them(inputs: dict[str, Path], params: Params) -> None:
    write_review(inputs["review"], 40)
    section = review.section(inputs, params)
    assert section is not None
    assert section.summary == "40 texts are worth a look: 40 because the label is in doubt."
    html = rendered(section)
    tables = html.css("table.sortable")
    assert [len(table.css("tbody tr")) for table in tables] == [3, 3, 15]
    assert tables[2].css_first("tbody th").text() == "<b>text</b> 0"
    assert "clean.corrections: my/corrections.csv" in words(html)
    assert "corrected already" not in words(html)


def test_corrections_in_force_are_told(inputs: dict[str, Path], params: Params) -> None:
    write_review(inputs["review"], 1)
    corrections = {"file": "my/c.csv", "sha256": "ab" * 32, "given": 5, "relabelled": 4, "dropped": 1}
    write_json(inputs["clean"] / "metrics.json", {"corrections": corrections})
    assert "4 changed and 1 texts dropped by my/c.csv" in words(rendered(review.section(inputs, params)))


def test_nothing_to_look_at_is_told(inputs: dict[str, Path], params: Params) -> None:
    write_review(inputs["review"], 0)
    section = review.section(inputs, params)
    assert section is not None and section.summary == "0 texts are worth a look."
    assert "How to correct" not in words(rendered(section))


def test_stages_that_did_not_run_have_no_section(params: Params) -> None:
    assert review.section({}, params) is None
    assert progress.section({}, params) is None


def champion(version: int, day: date, speed: float, inputs: dict[str, Path], **changes: Any) -> Champion:
    split = digest_of_test_split(inputs["evaluate@quantize"] / "predictions.parquet")
    values: dict[str, Any] = {
        "version": version, "day": day, "metric": "accuracy", "quality": 0.95, "texts_per_second": speed,
        "speedup": 5.0, "machine": "Made-up CPU", "test_split": split,
    }  # fmt: skip
    return Champion(**values | changes)


def write_history(folder: Path, champions: list[Champion], reached: bool = True) -> None:
    write_champions(folder / CHAMPIONS, champions)
    about = {"champions": len(champions), "reached": int(reached), "day": "2026-12-27"}
    write_json(folder / "metrics.json", about)


def test_the_doubling_time_is_that_of_the_champions_and_this_model(inputs: dict[str, Path], params: Params) -> None:
    # The model at hand answers 3,560 texts a second; a year of 360 days before it a quarter, in the middle half.
    champions = [
        champion(1, date(2026, 1, 1), 890.0, inputs),
        champion(2, date(2026, 6, 30), 1780.0, inputs),
        champion(3, date(2026, 8, 1), 9.0, inputs, machine="Other CPU", test_split="other"),
    ]
    write_history(inputs["history"], champions)
    section = progress.section(inputs, params)
    assert section is not None
    assert section.summary == "Speed doubles every 180 days over 3 models (95% interval 180 to 180 days)."
    html = rendered(section)
    rows = [[" ".join(cell.text(separator=" ").split()) for cell in row.css("th, td")] for row in html.css("tbody tr")]
    assert [row[0] for row in rows] == ["version 1", "version 2", "version 3", "this model"]
    assert rows[3][1:4] == ["2026-12-27", "95.9%", "3,560"]
    assert rows[2][2] == "95.0% another test split"
    assert "1 of them was timed on another machine" in words(html)
    assert html.css_first("figure svg") is not None


def test_a_first_model_has_too_little_history(inputs: dict[str, Path], params: Params) -> None:
    write_history(inputs["history"], [])
    section = progress.section(inputs, params)
    assert section is not None and not section.figures
    assert section.summary == (
        "Too little history: 1 model on 1 day; a doubling time needs 3 champions on different days."
    )
    assert len(rendered(section).css("tbody tr")) == 1


def test_a_registry_out_of_reach_is_told(inputs: dict[str, Path], params: Params) -> None:
    write_history(inputs["history"], [], reached=False)
    section = progress.section(inputs, params)
    assert section is not None and "could not be reached" in section.summary
    assert "dvc repro --force --single-item history" in words(rendered(section))


def test_champions_survive_their_table(inputs: dict[str, Path], tmp_path: Path) -> None:
    champions = [champion(1, date(2026, 1, 1), 890.5, inputs, machine='Odd, "CPU"')]
    write_champions(tmp_path / CHAMPIONS, champions)
    assert read_champions(tmp_path / CHAMPIONS) == champions
    (tmp_path / CHAMPIONS).write_text("version,day\n1,2026-01-01\n")
    with pytest.raises(UserError, match="is not a table of champions"):
        read_champions(tmp_path / CHAMPIONS)

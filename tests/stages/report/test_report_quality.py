"""The section on quality, and the faults that it must find in models made faulty on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from markupsafe import Markup
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.ladder import VARIANTS
from stages.core.metrics import softmax
from stages.core.params import Params, load_params
from stages.evaluate.calibration import at_temperature, fit_temperature, scaling_scores
from stages.evaluate.comparison import compare, flip_table
from stages.evaluate.embeddings import draw_map, silhouette
from stages.evaluate.quality import prediction_table, score_quality, write_reliability, write_tables
from stages.report.drawing import inline
from stages.report.page import _environment
from stages.report.sections import Section
from stages.report.sections.quality import section, swapped_labels

REPOSITORY = Path(__file__).parents[3]
NAMES = ["NA", "01", "<b>", "d"]
TEXTS = 2400
Change = Callable[[numpy.ndarray], numpy.ndarray]


@pytest.fixture(scope="module")
def params() -> Params:
    whole = load_params(REPOSITORY / "params.yaml")
    evaluate = whole.evaluate.model_copy(update={"bootstrap_samples": 300})
    return whole.model_copy(update={"evaluate": evaluate})


def honest(seed: int, texts: int = TEXTS) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Logits of a model that is right about as often as it says, nearly always, and the labels."""
    random = numpy.random.default_rng(seed)
    logits = 8.0 * numpy.eye(4)[numpy.arange(texts) % 4] + random.normal(0.0, 1.6, (texts, 4))
    labels = (softmax(logits).cumsum(axis=1) > random.random((texts, 1))).argmax(axis=1)
    return logits, labels


def write_evaluation(
    folder: Path, logits: numpy.ndarray, labels: numpy.ndarray, reference: numpy.ndarray, params: Params
) -> None:
    """What the stage leaves of a model with these logits, as far as the section reads it."""
    folder.mkdir(parents=True)
    probabilities, bins = softmax(logits), params.evaluate.calibration_bins
    answers, texts = logits.argmax(axis=1), [f"text {index}" for index in range(len(labels))]
    table = prediction_table(texts, labels, probabilities, NAMES)
    half = len(labels) // 2  # stands for the validation texts
    temperature = fit_temperature(probabilities[:half], labels[:half])
    against = compare(answers, reference, labels, params.quality, params.evaluate, seed=0)
    flips = [flip_table(role, reference, answers, labels, texts, NAMES) for role in ("parent", "reference")]
    places, shown = draw_map(logits[:80], "pca", seed=0)
    clusters = {"space": "hidden", "texts": 80, "silhouette": silhouette(logits[:80], labels[:80]), "map": "pca"}
    metrics: dict[str, Any] = {
        "texts": len(labels),
        **score_quality(probabilities, labels, NAMES, bins),
        "against_reference": against,
        "against_parent": against,
        "clusters": clusters | {"variance_shown": shown},
        "temperature_scaling": scaling_scores(probabilities, labels, temperature, bins),
    }
    write_json(folder / "metrics.json", metrics)
    write_tables(folder, table)
    write_reliability(folder / "calibration.csv", probabilities, labels, bins)
    write_reliability(folder / "calibration_scaled.csv", at_temperature(probabilities, temperature), labels, bins)
    pandas.concat(flips).to_csv(folder / "flips.csv", index=False, lineterminator="\n")
    table[:80].assign(x=places[:, 0], y=places[:, 1]).to_parquet(folder / "embeddings.parquet", index=False)


@pytest.fixture
def told(tmp_path: Path, params: Params) -> Callable[[Change], Section]:
    """The section over a fine-tuned model and a quantized one, which is the same with a change to its logits."""

    def tell(change: Change) -> Section:
        logits, labels = honest(seed=1)
        reference = logits.argmax(axis=1)
        write_evaluation(tmp_path / "finetune", logits, labels, reference, params)
        write_evaluation(tmp_path / "quantize", change(logits), labels, reference, params)
        found = section({f"evaluate@{name}": tmp_path / name for name in ("finetune", "quantize")}, params)
        assert found is not None
        return found

    return tell


def render(found: Section) -> HTMLParser:
    pictures = {name: Markup(inline(figure, name, found.descriptions[name])) for name, figure in found.figures.items()}
    template = _environment().get_template(f"sections/{found.identifier}.html")
    return HTMLParser(template.render(**found.context, pictures=pictures))


def test_a_sound_model_raises_no_alarm(told: Callable[[Change], Section]) -> None:
    found = told(lambda logits: logits)
    assert not found.alarm
    assert found.context["faults"] == []
    assert "no worse than the floor of 1.0" in found.summary
    page = render(found)
    assert not page.css(".bad")
    assert "no worse than the floor" in page.css(".good")[0].text()
    assert "None: both models answer every test text alike." in (page.body.text() if page.body else "")


def test_swapped_labels_are_found_and_named(told: Callable[[Change], Section]) -> None:
    found = told(lambda logits: logits[:, [0, 2, 1, 3]])
    assert found.alarm
    assert "The quantized model takes 01 for <b> and <b> for 01: their labels look swapped." in found.summary
    assert "falls below the floor" in found.summary
    page = render(found)
    assert "01 for <b>" in page.css("li.bad")[0].text()
    kinds = [row.css("td")[-1].text() for row in page.css("table")[3].css("tbody tr")]
    assert "lost" in kinds


def test_a_miscalibrated_head_is_found_and_named(told: Callable[[Change], Section]) -> None:
    found = told(lambda logits: 5.0 * logits)
    assert found.alarm
    assert "The quantized model is miscalibrated, far too sure of its answers: a temperature of " in found.summary
    assert len(found.context["faults"]) == 1  # its answers are those of the fine-tuned model
    temperatures = [row["temperature_scaling"]["temperature"] for row in found.context["variants"]]
    assert temperatures[1] / temperatures[0] == pytest.approx(5.0, rel=0.01)


def test_an_unsure_head_is_found_too(told: Callable[[Change], Section]) -> None:
    found = told(lambda logits: logits / 5.0)
    assert found.alarm
    assert "far less sure than it could be" in found.summary


def test_a_worse_model_is_found_and_named(told: Callable[[Change], Section]) -> None:
    def spoil(logits: numpy.ndarray) -> numpy.ndarray:
        spoilt = logits.copy()
        spoilt[::15] = numpy.roll(spoilt[::15], 1, axis=1)
        return spoilt

    found = told(spoil)
    assert found.alarm
    assert "The quantized model falls below the floor of 1.0 points" in found.summary
    row = found.context["against_reference"][0]
    assert row.verdict == "below the floor"
    assert row.mcnemar.significant


def test_too_few_texts_are_told_with_how_many_it_takes(tmp_path: Path, params: Params) -> None:
    logits, labels = honest(seed=2, texts=120)
    write_evaluation(tmp_path / "finetune", logits, labels, logits.argmax(axis=1), params)
    write_evaluation(tmp_path / "quantize", logits, labels, logits.argmax(axis=1), params)
    found = section({f"evaluate@{name}": tmp_path / name for name in ("finetune", "quantize")}, params)
    assert found is not None
    assert found.alarm
    assert "is not shown on 120 texts (p = 0.135); about 381 would show it" in found.summary


def test_a_rare_class_that_is_never_found_is_no_swap() -> None:
    table = pandas.DataFrame({"actual": ["a"] * 9 + ["b"] * 2, "predicted": ["a"] * 11})
    assert swapped_labels(table) == []
    swap = pandas.DataFrame({"actual": ["a", "a", "b", "b", "b"], "predicted": ["b", "b", "a", "a", "b"]})
    assert swapped_labels(swap) == [("a", "b")]


def test_the_whole_default_chain_is_told(project: Path) -> None:
    inputs = {f"evaluate@{name}": Path("artifacts/evaluate") / name for name in VARIANTS}
    found = section(inputs, load_params(Path("params.yaml")))
    assert found is not None
    assert not found.alarm
    assert [row.title for row in found.context["against_parent"]] == [
        "distilled", "pruned", "quantized", "quantized only", "cascade",
    ]  # fmt: skip
    assert [row.other for row in found.context["against_parent"]] == [
        "fine-tuned", "distilled", "pruned", "fine-tuned", "quantized only",
    ]  # fmt: skip
    assert {row.mcnemar.corrected for row in found.context["against_reference"]} == {1.0}
    page = render(found)
    for table in page.css("table"):
        heads = len(table.css("thead th"))
        assert all(len(row.css("th, td")) == heads for row in table.css("tbody tr"))
        assert table.css_first("caption") is not None
    assert "<b>caldera</b>" in page.css("table")[3].text()  # shown, not obeyed
    assert len(page.css("svg[role=img]")) == 2


def test_a_page_without_temperatures_says_so(project: Path) -> None:
    inputs = {f"evaluate@{name}": Path("artifacts/evaluate") / name for name in ("finetune", "quantize")}
    params = load_params(Path("params.yaml"))
    for folder in inputs.values():
        (folder / "calibration_scaled.csv").unlink()
    found = section(inputs, params)
    assert found is not None
    for row in found.context["variants"]:
        del row["temperature_scaling"]
    page = render(found)
    assert "No temperature was fitted" in page.html


def test_nothing_to_tell_and_something_missing(project: Path) -> None:
    params = load_params(Path("params.yaml"))
    assert section({}, params) is None
    folder = Path("artifacts/evaluate/finetune")
    (folder / "embeddings.parquet").unlink()
    with pytest.raises(UserError, match=r"finetune/embeddings\.parquet: no such file"):
        section({"evaluate@finetune": folder}, params)

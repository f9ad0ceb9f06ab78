"""The stage from end to end on tiny models, and what the page makes of it."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pandas
import pytest
import safetensors.numpy
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.core.artifacts import read_json, write_json
from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.examples import load_examples
from stages.core.judging import predict_logits
from stages.core.metrics import softmax
from stages.core.observe.tracking import RunRecord
from stages.core.params import Params, load_params
from stages.core.stage import StageRun
from stages.explain.__main__ import rank_correlation, run_explain
from stages.explain.reader import Reader
from stages.report.drawing import inline
from stages.report.sections import Section, explanations

REPOSITORY = Path(__file__).parents[3]
PARAMS = load_params(REPOSITORY / "presets/tiny.yaml")


def explain(teacher: Path, compressed: Path, data: Path, folder: Path, params: Params = PARAMS) -> StageRun:
    record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
    inputs = {"teacher": teacher, "compressed": compressed, "data": data}
    run = StageRun("explain", params, inputs, folder, folder / "state", record)
    write_json(folder / "metrics.json", run_explain(run))
    return run


@pytest.fixture(scope="session")
def explained(
    keyword_checkpoint: Path, lean_checkpoint: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    explain(keyword_checkpoint, lean_checkpoint, tiny_data, folder)
    return folder


def test_every_text_has_both_models_reasons(explained: Path, keyword_checkpoint: Path, tiny_data: Path) -> None:
    found = read_json(explained / "explanations.json")
    test = load_examples(tiny_data, "test")
    reader = Reader.load(keyword_checkpoint, tiny_data)
    assert len(found["texts"]) == PARAMS.explain.texts
    for place, text in enumerate(found["texts"]):
        assert text["text"] == test.texts[text["index"]]
        logits = predict_logits(reader.model, [reader.tokenizer.encode(text["text"]).ids], reader.pad_id)
        own = text["models"]["teacher"]
        assert own["probability"] == pytest.approx(float(softmax(logits.numpy()).max()), abs=1e-5)
        assert own["path"][-1]["answer"] == own["answer"]
        assert text["flip"] == (own["answer"] != text["models"]["compressed"]["answer"])
        methods = {"integrated_gradients", "rollout"} | ({"shapley", "lime"} if place < found["chosen"] else set())
        for model in text["models"].values():
            assert set(model["attributions"]) == methods
            assert {len(values) for values in model["attributions"].values()} == {len(text["words"])}
            assert ("neighbours" in model) == (place < found["chosen"])
            missed = abs(sum(model["attributions"]["integrated_gradients"]) - model["difference"])
            assert missed <= 0.01 * max(abs(model["difference"]), 1.0) + 1e-6


def test_tables_and_maps_say_the_same(explained: Path) -> None:
    found = read_json(explained / "explanations.json")
    table = pandas.read_csv(explained / "attributions.csv", keep_default_na=False)
    first = found["texts"][0]
    rows = table[(table["index"] == first["index"]) & (table["model"] == "compressed") & (table["method"] == "lime")]
    assert rows["word"].tolist() == first["words"]
    numpy.testing.assert_allclose(rows["attribution"], first["models"]["compressed"]["attributions"]["lime"])
    maps = safetensors.numpy.load_file(explained / "attention.safetensors")
    # The compressed model's first layer has no heads.
    assert set(maps) == {
        f"{key}" for text in range(2) for key in (f"teacher.{text}.0", f"teacher.{text}.1", f"compressed.{text}.1")
    }
    tokens = len(found["tokens"]["teacher"][0])
    assert maps["teacher.0.0"].shape == (4, tokens, tokens)
    faithfulness = pandas.read_csv(explained / "faithfulness.csv")
    assert len(faithfulness) == 2 * 4 * 4
    metrics = read_json(explained / "metrics.json")
    row = faithfulness[(faithfulness["model"] == "teacher") & (faithfulness["method"] == "integrated_gradients")].iloc[
        0
    ]
    own = metrics["teacher"]["against_random"]["integrated_gradients"][row["measure"]]
    assert own["low"] == pytest.approx(row["low"])
    assert metrics["compressed"]["smooth_gap"] > 0.0 == metrics["teacher"]["smooth_gap"]


def test_a_model_against_itself_moves_nothing(keyword_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    explain(keyword_checkpoint, keyword_checkpoint, tiny_data, tmp_path)
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["flips"] == 0
    assert metrics["correlation"]["lowest"] == pytest.approx(1.0)
    again = tmp_path / "again"
    again.mkdir()
    explain(keyword_checkpoint, keyword_checkpoint, tiny_data, again)
    assert (again / "explanations.json").read_bytes() == (tmp_path / "explanations.json").read_bytes()


def test_rank_correlation_needs_three_words_that_differ() -> None:
    assert rank_correlation(numpy.array([1.0, 2.0, 3.0]), numpy.array([10.0, 30.0, 20.0])) == pytest.approx(0.5)
    assert rank_correlation(numpy.array([1.0, 2.0]), numpy.array([1.0, 2.0])) is None
    assert rank_correlation(numpy.zeros(4), numpy.arange(4.0)) is None


def test_flips_come_first_up_to_half(keyword_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    broken = load_model(keyword_checkpoint)
    head: Any = broken.get_submodule("classifier")
    head.weight.data = head.weight.data.roll(1, dims=0)  # every answer becomes another
    head.bias.data = head.bias.data.roll(1)
    folder = tmp_path / "broken"
    save_model(broken, folder, keyword_checkpoint, [])
    out = tmp_path / "out"
    out.mkdir()
    explain(keyword_checkpoint, folder, tiny_data, out)
    metrics = read_json(out / "metrics.json")
    assert metrics["flips"] == len(load_examples(tiny_data, "test"))
    assert metrics["flips_explained"] == PARAMS.explain.texts  # there are no others
    # The heads differ, the body is the same: for one answer the reasons are other reasons now.
    assert metrics["correlation"]["mean"] < 0.9


def test_too_few_texts_are_named(keyword_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    pandas.read_parquet(data / "test.parquet")[:1].to_parquet(data / "test.parquet")
    with pytest.raises(UserError, match="the test split has 1 texts of 2 words or more"):
        explain(keyword_checkpoint, keyword_checkpoint, data, tmp_path)


@pytest.fixture
def page(explained: Path, tmp_path: Path) -> Path:
    shutil.copytree(explained, tmp_path / "explain")
    return tmp_path / "explain"


def show(folder: Path) -> tuple[Section, str]:
    found = explanations.section({"explain": folder}, PARAMS)
    assert found is not None
    environment = Environment(
        loader=FileSystemLoader(Path(explanations.__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    pictures = {name: Markup(inline(figure, name, found.descriptions[name])) for name, figure in found.figures.items()}
    return found, environment.get_template("explanations.html").render(**found.context, pictures=pictures)


class Outline(HTMLParser):
    """Counts tags and checks that they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shaded: list[dict[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("br",):
            self.open.append(tag)
        if tag == "span" and "word" in str(dict(attributes).get("class")).split():
            self.shaded.append(dict(attributes))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shades_every_word_of_the_chosen_texts(page: Path) -> None:
    found, html = show(page)
    outline = Outline(html)
    texts = read_json(page / "explanations.json")["texts"][: PARAMS.explain.chosen]
    assert len(outline.shaded) == 2 + sum(2 * len(text["words"]) for text in texts)
    weights = [float(str(span["style"]).removeprefix("--weight:")) for span in outline.shaded]
    assert max(weights) == 1.0 and min(weights) >= 0.0
    assert len(html.encode()) < 400_000
    assert set(found.figures) == set(found.descriptions) == {"explain_curves", "explain_attention"}


def test_the_page_escapes_what_texts_say(page: Path) -> None:
    path = page / "explanations.json"
    path.write_text(path.read_text().replace('"text": "', '"text": "<script>alert(1)</script> '))
    assert "<script>" not in show(page)[1]


def test_attributions_no_better_than_random_raise_the_alarm(page: Path) -> None:
    table = pandas.read_csv(page / "faithfulness.csv")
    table["low"] = 0.1
    table.to_csv(page / "faithfulness.csv", index=False)
    quiet = explanations.section({"explain": page}, PARAMS)
    assert quiet is not None and not quiet.alarm and "all four tests" in quiet.summary
    table.loc[(table["method"] == "rollout"), "low"] = -0.1
    table.to_csv(page / "faithfulness.csv", index=False)
    rollout = explanations.section({"explain": page}, PARAMS)
    assert rollout is not None and not rollout.alarm
    hit = (table["method"] == "integrated_gradients") & (table["measure"] == "deletion")
    table.loc[hit & (table["model"] == "compressed"), "low"] = -0.01
    table.to_csv(page / "faithfulness.csv", index=False)
    found, html = show(page)
    assert found.alarm
    assert "deletion of the compressed model" in found.summary
    assert "Do not rely on the shaded words" in html


def test_without_the_stage_there_is_no_section() -> None:
    assert explanations.section({}, PARAMS) is None

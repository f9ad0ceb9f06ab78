"""Runs on disk, mirrored to MLflow.

The files under `artifacts/.runs/<execution>/<stage>/` are the truth; MLflow is a mirror of them. While a stage runs the
flow keeps the mirror fresh (`flows.tracking`); under `dvc repro`, where there is no flow, a thread of the stage does.
If MLflow cannot be reached the stage goes on and says so once; the next run that reaches it fills in what is missing,
because mirroring always starts from the files.

An *execution* is one run of the pipeline: one `headroom run`, or one `dvc repro`. It is the parent run of its stages.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from stages.core.artifacts import ARTIFACTS, digest, read_json, write_json
from stages.core.observe.progress import say
from stages.core.params import Params

RUNS = ARTIFACTS / ".runs"
EXECUTION_VARIABLE = "HEADROOM_EXECUTION"
MIRRORED_VARIABLE = "HEADROOM_MIRRORED"
"""Set where the flow mirrors the runs of its stages: MLflow takes seconds to import, and training waits meanwhile."""
RUN_FILE = "run.json"
MIRROR_FILE = "mirror.json"
HISTORY_FILE = "history.jsonl"
PARENT_FILE = "execution.json"

SECONDS_BETWEEN_PUSHES = 5.0
"""Whoever sends takes time from what trains or measures meanwhile."""

_SECONDS_TO_WAIT_AT_THE_END = 30.0
_SECONDS_TO_WAIT_WHEN_INTERRUPTED = 3.0
_POINTS_PER_BATCH = 900  # MLflow takes at most 1000 metrics in one call
_PARAMS_PER_BATCH = 90  # and at most 100 params
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
_LONGEST_PARAM = 500
_LONGEST_NAME = 250
_SHOWN = {".json", ".csv", ".md", ".png", ".svg", ".html"}


class RunRecord:
    """One run of one stage: its files, and the thread that mirrors them where the flow does not."""

    def __init__(self, folder: Path, run: dict[str, Any], uri: str):
        self.folder = folder
        self._run = run
        self._metrics: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_keep_mirrored, args=(folder, uri, self._stop), daemon=True)

    @classmethod
    def start(cls, name: str, params: Params, origins: Mapping[str, str], section: str | None = None) -> RunRecord:
        """Open the record of a stage's run and start mirroring it, unless the flow does.

        Args:
            name: stage, or `stage@variant`.
            params: of the whole pipeline; one section and the seed are recorded with the run.
            origins: digests of the inputs, by role.
            section: which; None takes the one that is named like the stage.
        """
        execution = open_execution(params)
        started = milliseconds()
        folder = RUNS / execution / f"{name}-{started}"
        values = params.model_dump(mode="json").get(section or name.split("@")[0], {})
        run = {
            "name": name,
            "experiment": params.tracking.experiment,
            "started": started,
            "ended": None,
            "status": "RUNNING",
            "pid": os.getpid(),
            "params": flatten({"seed": params.seed, **values}),
            "metrics": {},
            "tags": {"headroom.stage": name, **{f"headroom.input.{role}": sum_ for role, sum_ in origins.items()}},
            "output": None,
        }
        write_json(folder / RUN_FILE, run)
        record = cls(folder, run, tracking_uri(params))
        if not os.environ.get(MIRRORED_VARIABLE):
            record._thread.start()
        return record

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a point of the curves."""
        line = {"step": step, "time": milliseconds(), "values": dict(values)}
        with (self.folder / HISTORY_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Record final metrics; nested ones get dotted names, anything but a number is left out."""
        self._metrics.update(
            {name: float(value) for name, value in flatten(metrics).items() if isinstance(value, int | float)}
        )

    def finish(self, out: Path) -> None:
        """Close the record of a stage that published `out`."""
        self._close("FINISHED", output=str(out), tags={"headroom.output": digest(out)})

    def fail(self, problem: BaseException) -> None:
        """Close the record of a stage that ended with `problem`."""
        status = "KILLED" if isinstance(problem, KeyboardInterrupt) else "FAILED"
        self._close(status, output=None, tags={"headroom.error": f"{type(problem).__name__}: {problem}"[:500]})

    def _close(self, status: str, output: str | None, tags: dict[str, str]) -> None:
        self._run.update(status=status, ended=milliseconds(), metrics=self._metrics, output=output)
        self._run["tags"].update(tags)
        write_json(self.folder / RUN_FILE, self._run)
        if not self._thread.is_alive():
            return
        self._stop.set()
        interrupted = status == "KILLED"
        self._thread.join(_SECONDS_TO_WAIT_WHEN_INTERRUPTED if interrupted else _SECONDS_TO_WAIT_AT_THE_END)


class SilentRecord(RunRecord):
    """Of a process that keeps no record: another one does, or nobody is to see what it trains."""

    def __init__(self) -> None:
        self._metrics = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep nothing."""


def open_execution(params: Params) -> str:
    """Return the id of the execution this process belongs to, and record the execution if it is new."""
    execution = os.environ.get(EXECUTION_VARIABLE) or _execution_of_process()
    path = RUNS / execution / PARENT_FILE
    with file_lock(path):
        if not path.exists():
            record = {
                "name": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
                "experiment": params.tracking.experiment,
                "started": milliseconds(),
                "params": flatten(params.model_dump(mode="json", exclude={"tracking"})),
                "tags": {"headroom.execution": execution, **git_tags()},
            }
            write_json(path, record)
    return execution


def tracking_uri(params: Params) -> str:
    """Where runs are mirrored: the environment goes before params, and SQLite in artifacts is the default."""
    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri or _default_uri()


def open_client(uri: str) -> Any:
    """Connect to MLflow, quietly and without waiting long for a server that is not there."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient  # slow to import, so not before it is needed

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def complain(uri: str, problem: Exception) -> None:
    """Say in one line, without secrets, that MLflow is away and that this costs nothing."""
    reason = _without_secrets_in(problem)
    say(f"MLflow at {_without_secrets(uri)} cannot be reached ({reason}); going on, the run is filled in later")


def _without_secrets_in(problem: Exception) -> str:
    return re.sub(r"//\S*@", "//", " ".join(str(problem).split()))[:120]


def mirror_all(client: Any, uri: str) -> int:
    """Fill in every ended run that `uri` does not hold yet; return how many were waiting."""
    waiting = [path.parent for path in sorted(RUNS.glob(f"*/*/{RUN_FILE}")) if _waits(path.parent, uri)]
    for folder in waiting:
        _mirror_or_leave(folder, client, uri)
    return len(waiting)


def mirror_live(execution: str, client: Any, uri: str) -> None:
    """Send what is new of the runs of an execution that is going."""
    for path in sorted((RUNS / execution).glob(f"*/{RUN_FILE}")):
        if not _mirror_state(path.parent, uri)["ended"]:
            _mirror_or_leave(path.parent, client, uri)


def _mirror_or_leave(folder: Path, client: Any, uri: str) -> None:
    with leave_refused(folder):
        mirror(folder, client, uri)
        return
    with file_lock(folder / RUN_FILE):
        write_json(folder / MIRROR_FILE, {**_mirror_state(folder, uri), "ended": True})


@contextmanager
def leave_refused(folder: Path) -> Iterator[None]:
    """Go on where MLflow answers that it will not have something of a run, as after its deletion, and say so."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as problem:
        if problem.error_code not in _REFUSALS:
            raise
        say(f"{folder}: MLflow does not take this run ({_without_secrets_in(problem)}); it is left out there")


def mirror(folder: Path, client: Any, uri: str) -> str:
    """Send what MLflow does not hold yet of one run; calling it again sends only what is new. Return the run's id."""
    with file_lock(folder / RUN_FILE):
        run, state = read_json(folder / RUN_FILE), _mirror_state(folder, uri)
        if not state["described"]:
            parent = mirror_execution(folder.parent, client, uri)
            _describe(client, run, {"mlflow.parentRunId": parent}, folder, state)
        state["points"] += _send_points(client, state["run_id"], folder / HISTORY_FILE, state["points"])
        if run["ended"] and not state["ended"]:
            _send_end(client, state["run_id"], run)
            state["ended"] = True
        write_json(folder / MIRROR_FILE, state)
    return str(state["run_id"])


def mirror_execution(folder: Path, client: Any, uri: str) -> str:
    """Create the parent run of an execution where it is missing; return its id."""
    with file_lock(folder / PARENT_FILE):
        state = _mirror_state(folder, uri)
        if not state["described"]:
            _describe(client, read_json(folder / PARENT_FILE), {}, folder, state)
    return str(state["run_id"])


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted names; lists become their text."""
    if not isinstance(value, Mapping):
        return {prefix: value if isinstance(value, int | float | str | None) else json.dumps(value)}
    flat: dict[str, Any] = {}
    for name, child in value.items():
        flat.update(flatten(child, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def mlflow_name(name: str) -> str:
    """Replace what MLflow refuses in names, such as the @ of `evaluate@prune` or a label's punctuation."""
    return re.sub(r"^\.|[^\w.\- ]", "_", name)[:_LONGEST_NAME]


def milliseconds() -> int:
    """Return the time since the epoch in milliseconds, as MLflow counts."""
    return time.time_ns() // 1_000_000


def git_tags() -> dict[str, str]:
    """Name the commit and branch in the tags that the MLflow UI knows; empty outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    branch = _git("rev-parse", "--abbrev-ref", "HEAD")
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.branch": branch, "headroom.git.dirty": str(dirty)}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _keep_mirrored(folder: Path, uri: str, stop: threading.Event) -> None:
    try:
        client = open_client(uri)
        while not stop.wait(SECONDS_BETWEEN_PUSHES):
            mirror(folder, client, uri)
        mirror(folder, client, uri)
        mirror_all(client, uri)
    except Exception as problem:  # noqa: BLE001  tracking must never end a stage; what happened is said, and retried later
        complain(uri, problem)


def _waits(folder: Path, uri: str) -> bool:
    run = read_json(folder / RUN_FILE)
    if run["ended"] is None and not _is_running(run):
        run = read_json(folder / RUN_FILE)  # it may have ended between the first look and the second
        if run["ended"] is None:
            run.update(status="KILLED", ended=milliseconds())
            write_json(folder / RUN_FILE, run)
    return run["ended"] is not None and not _mirror_state(folder, uri)["ended"]


def _is_running(run: Mapping[str, Any]) -> bool:
    """A process of the same number that is younger than the run is another one."""
    try:
        return bool(psutil.Process(run["pid"]).create_time() * 1000 <= run["started"])
    except psutil.NoSuchProcess:
        return False


def _mirror_state(folder: Path, uri: str) -> dict[str, Any]:
    """What MLflow holds of a run; a mirror elsewhere does not count."""
    path = folder / MIRROR_FILE
    state = read_json(path) if path.exists() else {}
    if state.get("uri") == _without_secrets(uri):
        return dict(state)
    return {"uri": _without_secrets(uri), "run_id": None, "described": False, "points": 0, "ended": False}


def _describe(
    client: Any, run: Mapping[str, Any], tags: Mapping[str, str], folder: Path, state: dict[str, Any]
) -> None:
    """Create a run with its params. Its id is kept at once, so that a server that fails midway gets no second run."""
    if not state["run_id"]:
        state["run_id"] = _create(client, run, tags)
        write_json(folder / MIRROR_FILE, state)
    _send_params(client, state["run_id"], run["params"])
    state["described"] = True
    write_json(folder / MIRROR_FILE, state)


def _create(client: Any, run: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    name = run["experiment"]
    experiment = client.get_experiment_by_name(name)
    identifier = experiment.experiment_id if experiment else client.create_experiment(name, _artifact_location(client))
    named = {mlflow_name(key): value for key, value in {**run["tags"], **tags}.items()}
    created = client.create_run(identifier, start_time=run["started"], run_name=run["name"], tags=named)
    return str(created.info.run_id)


def _artifact_location(client: Any) -> str | None:
    """Beside the default database; a server chooses for itself."""
    return (ARTIFACTS / "mlflow" / "files").resolve().as_uri() if client.tracking_uri.startswith("sqlite") else None


def _send_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(mlflow_name(name), str(value)[:_LONGEST_PARAM]) for name, value in params.items()]
    for start in range(0, len(entries), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + _PARAMS_PER_BATCH])


def _send_points(client: Any, run_id: str, path: Path, sent: int) -> int:
    """Send the lines of the history after the first `sent`; return how many lines that was."""
    from mlflow.entities import Metric

    lines = _complete_lines(path)[sent:]
    entries = [
        Metric(mlflow_name(name), float(value), line["time"], line["step"])
        for line in map(json.loads, lines)
        for name, value in line["values"].items()
    ]
    for start in range(0, len(entries), _POINTS_PER_BATCH):
        client.log_batch(run_id, metrics=entries[start : start + _POINTS_PER_BATCH])
    return len(lines)


def _complete_lines(path: Path) -> list[str]:
    """A line still being written has no end yet and waits for the next push."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _send_end(client: Any, run_id: str, run: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(mlflow_name(name), value, run["ended"], 0) for name, value in run["metrics"].items()]
    tags = [RunTag(mlflow_name(name), value) for name, value in run["tags"].items()]
    client.log_batch(run_id, tags=tags)
    for start in range(0, len(metrics), _POINTS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _POINTS_PER_BATCH])
    for path in _shown_files(run["output"]):
        client.log_artifact(run_id, str(path))
    client.set_terminated(run_id, run["status"], run["ended"])
    parent = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    client.set_terminated(parent, run["status"], run["ended"])


def _shown_files(output: str | None) -> Iterator[Path]:
    """Files that people look at in the UI: metrics, curves, pictures and the report, not the models."""
    folder = Path(output) if output else None
    if folder is None or not folder.is_dir():
        return
    for path in sorted([*folder.iterdir(), *folder.glob("plots/*")]):
        if path.is_file() and path.suffix in _SHOWN:
            yield path


def _execution_of_process() -> str:
    """Name the `dvc` process above this one, so that all stages of one `dvc repro` share an execution."""
    me = psutil.Process()
    for process in [*reversed(me.parents()), me]:
        if _is_dvc(process):
            return f"{int(process.create_time())}-{process.pid}"
    return f"{int(me.create_time())}-{me.pid}"


def _is_dvc(process: psutil.Process) -> bool:
    """Tell `dvc`, `python -m dvc` and `python .venv/bin/dvc` from an editor that has `dvc.yaml` open."""
    try:
        return any(Path(word).name == "dvc" for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def _default_uri() -> str:
    return f"sqlite:///{(ARTIFACTS / 'mlflow' / 'mlflow.db').resolve()}"


def _without_secrets(uri: str) -> str:
    """Drop a user name and password from a URI."""
    scheme, mark, rest = uri.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark and not scheme.startswith("sqlite") else uri


def file_lock(path: Path) -> FileLock:
    """A lock beside a file, for threads and processes that change it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=60)

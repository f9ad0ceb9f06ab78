"""The runs of an execution, told to MLflow by the flow: what its stages record, while they run, and what only the flow
knows: cached stages, DVC's fingerprints, how it ended, the report.

Stages write their records as files under `artifacts/.runs` (`stages.core.observe.tracking`) and MLflow follows: what
cannot be sent now is sent once it answers again, by this run or a later one. Under `dvc repro` stages send their own.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.graph import Stage
from stages.core.artifacts import MANIFEST, digest, read_json, write_json
from stages.core.observe.tracking import (
    MIRROR_FILE,
    RUN_FILE,
    RUNS,
    SECONDS_BETWEEN_PUSHES,
    complain,
    milliseconds,
    mirror,
    mirror_all,
    mirror_execution,
    mirror_live,
    open_client,
    tracking_uri,
)
from stages.core.params import Params

CACHED = "headroom.cached"
MADE_BY = "headroom.made_by"
FINGERPRINT = "dvc.fingerprint"
OUTPUT = "headroom.output"
CLOSING_FILE = "ended.json"
REUSED = "headroom.reused"
"""Digest of the output that a cached stage reuses; `headroom.output` is kept for the run that made it."""

_SECONDS_TO_WAIT_AT_THE_END = 60.0
_SECONDS_TO_WAIT_WHEN_AWAY = 15.0


class Tracker:
    """Tells MLflow about one execution from a thread of its own, in the order in which things happened.

    The first thing that goes wrong is said, the others are not: the files hold it all, and every few seconds what is
    missing is tried again.
    """

    def __init__(self, execution: str, params: Params):
        self.execution = execution
        self.params = params
        self.uri = tracking_uri(params)
        self._client: Any = None
        self._behind = True
        """Whether MLflow may lack something of an earlier run or of this one."""
        self._complained = False
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._keep_telling, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin with what earlier runs could not send; then follow the stages that run."""
        self._work.put(self._mirror_stages)
        self._thread.start()

    def reused(self, stage: Stage) -> None:
        """Record that a stage was cached, linked to the run that made its output."""
        folder = record_reused(stage, self.execution, self.params.tracking.experiment)
        self._work.put(lambda: mirror_reused(folder, self._client, self.uri))

    def ran(self) -> None:
        """Tag the runs of the stages that ran with DVC's fingerprint of what they made."""
        from flows.graph import read_fingerprints

        fingerprints = read_fingerprints()
        self._work.put(lambda: tag_fingerprints(self.execution, fingerprints, self._client, self.uri))

    def finish(self, status: str, report: Path | None) -> None:
        """Close the parent run with its status, and the report with it; wait until MLflow holds everything."""
        write_json(RUNS / self.execution / CLOSING_FILE, {"status": status, "ended": milliseconds()})
        self._work.put(self._catch_up)  # a stage that was killed left a record that looks as if it ran
        self._work.put(lambda: self._send_report(report))
        self._work.put(lambda: close_parent(RUNS / self.execution, self._client, self.uri))
        self._work.put(None)
        self._thread.join(_SECONDS_TO_WAIT_WHEN_AWAY if self._complained else _SECONDS_TO_WAIT_AT_THE_END)

    def _keep_telling(self) -> None:
        while (task := self._next_task()) is not None:
            try:
                self._tell(task)
            except Exception as problem:  # noqa: BLE001  tracking must never end a run; what happened is said, and sent later
                if not self._complained:
                    complain(self.uri, problem)
                self._complained = True

    def _next_task(self) -> Callable[[], object] | None:
        try:
            return self._work.get(timeout=SECONDS_BETWEEN_PUSHES)
        except queue.Empty:
            return self._mirror_stages

    def _tell(self, task: Callable[[], object]) -> None:
        if self._client is None:
            self._client = open_client(self.uri)
        if self._behind:
            self._catch_up()
        self._behind = True  # until the task is through
        task()
        self._behind = False

    def _mirror_stages(self) -> None:
        mirror_live(self.execution, self._client, self.uri)

    def _catch_up(self) -> None:
        mirror_all(self._client, self.uri)
        for path in sorted(RUNS.glob(f"*/*/{RUN_FILE}")):
            if _waits_for_link(path.parent):
                mirror_reused(path.parent, self._client, self.uri)
        for path in sorted(RUNS.glob(f"*/{CLOSING_FILE}")):
            if not _mirrored(path.parent, "closed"):
                close_parent(path.parent, self._client, self.uri)

    def _send_report(self, report: Path | None) -> None:
        if report is not None and report.is_file():
            parent = mirror_execution(RUNS / self.execution, self._client, self.uri)
            self._client.log_artifact(parent, str(report))


def new_execution() -> str:
    """Make a name for an execution, unique and in the order of time."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def record_reused(stage: Stage, execution: str, experiment: str) -> Path:
    """Write the record of a cached stage; return its folder."""
    now = milliseconds()
    folder = RUNS / execution / f"{stage.name}-{now}"
    tags = {"headroom.stage": stage.name, CACHED: "true"}
    if (stage.folder / MANIFEST).is_file():
        tags[REUSED] = digest(stage.folder)
    if stage.fingerprint:
        tags[FINGERPRINT] = stage.fingerprint
    record = {
        "name": stage.name,
        "experiment": experiment,
        "started": now,
        "ended": now,
        "status": "FINISHED",
        "params": {},
        "metrics": {},
        "tags": tags,
        "output": None,
    }
    write_json(folder / RUN_FILE, record)
    return folder


def mirror_reused(folder: Path, client: Any, uri: str) -> str:
    """Send the record of a cached stage, with a link to the run that made what it reuses; return the run's id."""
    tags = read_json(folder / RUN_FILE)["tags"]
    run_id = mirror(folder, client, uri)
    maker = find_maker(tags["headroom.stage"], tags[REUSED], client) if REUSED in tags else None
    if maker is not None:
        link = f"#/experiments/{maker.info.experiment_id}/runs/{maker.info.run_id}"
        client.set_tag(run_id, MADE_BY, maker.info.run_id)
        client.set_tag(run_id, "mlflow.note.content", f"Nothing changed since [{maker.info.run_name}]({link}) made it.")
    _mark(folder, "linked")
    return run_id


def find_maker(stage: str, output: str, client: Any) -> Any | None:
    """Return the newest MLflow run of a stage that published the output with this digest; None where none is known."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = f"tags.`{OUTPUT}` = '{output}' and tags.`headroom.stage` = '{stage}'"
    found = client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=1)
    return found[0] if found else None


def tag_fingerprints(execution: str, fingerprints: Mapping[str, str], client: Any, uri: str) -> None:
    """Add DVC's fingerprint to the finished runs of an execution that have none."""
    for path in (RUNS / execution).glob(f"*/{RUN_FILE}"):
        run = read_json(path)
        known = fingerprints.get(run["name"])
        if run["status"] != "FINISHED" or FINGERPRINT in run["tags"] or not known:
            continue
        run["tags"][FINGERPRINT] = known
        write_json(path, run)
        client.set_tag(mirror(path.parent, client, uri), FINGERPRINT, known)


def close_parent(folder: Path, client: Any, uri: str) -> None:
    """Give the parent run of an execution that ended its status."""
    closing = read_json(folder / CLOSING_FILE)
    client.set_terminated(mirror_execution(folder, client, uri), closing["status"], closing["ended"])
    _mark(folder, "closed")


def _waits_for_link(folder: Path) -> bool:
    return read_json(folder / RUN_FILE)["tags"].get(CACHED) == "true" and not _mirrored(folder, "linked")


def _mirrored(folder: Path, mark: str) -> bool:
    path = folder / MIRROR_FILE
    return path.exists() and bool(read_json(path).get(mark))


def _mark(folder: Path, mark: str) -> None:
    path = folder / MIRROR_FILE
    write_json(path, {**read_json(path), mark: True})

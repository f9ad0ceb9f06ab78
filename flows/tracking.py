"""The runs of an execution, told to MLflow by the flow: what its stages record, while they run, and what only the flow
knows: cached stages, DVC's fingerprints, how it ended, the report.

Stages write their records as files under `artifacts/.runs` (`stages.core.observe.tracking`) and MLflow follows: what
cannot be sent now is sent once it answers again, by this run or a later one. Under `dvc repro` stages send their own.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.graph import Stage
from stages.core.artifacts import MANIFEST, digest, read_json, write_json
from stages.core.observe.progress import say
from stages.core.observe.tracking import (
    MIRROR_FILE,
    RUN_FILE,
    RUNS,
    SECONDS_BETWEEN_PUSHES,
    complain,
    file_lock,
    leave_refused,
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
        self._work.put(lambda: send_link(folder, self._client, self.uri))

    def ran(self) -> None:
        """Record DVC's fingerprints of what the stages that ran made."""
        from flows.graph import read_fingerprints

        record_fingerprints(self.execution, read_fingerprints())
        self._work.put(lambda: send_fingerprints(self._client, self.uri))

    def finish(self, status: str, report: Path | None) -> None:
        """Close the parent run with its status, and the report with it; wait until MLflow holds everything."""
        closing = {"status": status, "ended": milliseconds(), "report": str(report) if report else None}
        write_json(RUNS / self.execution / CLOSING_FILE, closing)
        self._work.put(self._catch_up)
        self._work.put(None)
        self._thread.join(_SECONDS_TO_WAIT_WHEN_AWAY if self._complained else _SECONDS_TO_WAIT_AT_THE_END)
        if self._thread.is_alive():
            say("MLflow is slow and does not hold all of this run yet; the next run fills in what is missing")

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
        self._behind = self._complained = False

    def _mirror_stages(self) -> None:
        mirror_live(self.execution, self._client, self.uri)

    def _catch_up(self) -> None:
        """Send all that is on disk and not in MLflow, what runs now before what is old."""
        self._mirror_stages()
        mirror_all(self._client, self.uri)
        for path in sorted(RUNS.glob(f"*/*/{RUN_FILE}")):
            if read_json(path)["tags"].get(CACHED) == "true":
                send_link(path.parent, self._client, self.uri)
        send_fingerprints(self._client, self.uri)
        for path in sorted(RUNS.glob(f"*/{CLOSING_FILE}")):
            close_parent(path.parent, self._client, self.uri)


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


def send_link(folder: Path, client: Any, uri: str) -> None:
    """Send the record of a cached stage, with a link to the run that made what it reuses."""
    with _once(folder, "linked") as wanted:
        if not wanted:
            return
        tags = read_json(folder / RUN_FILE)["tags"]
        run_id = mirror(folder, client, uri)
        maker = find_maker(tags["headroom.stage"], tags[REUSED], client) if REUSED in tags else None
        if maker is not None:
            link = f"#/experiments/{maker.info.experiment_id}/runs/{maker.info.run_id}"
            client.set_tag(run_id, MADE_BY, maker.info.run_id)
            note = f"Nothing changed since [{maker.info.run_name}]({link}) made it."
            client.set_tag(run_id, "mlflow.note.content", note)


def find_maker(stage: str, output: str, client: Any) -> Any | None:
    """Return the newest MLflow run of a stage that published the output with this digest; None where none is known."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = f"tags.`{OUTPUT}` = '{output}' and tags.`headroom.stage` = '{stage}'"
    found = client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=1)
    return found[0] if found else None


def record_fingerprints(execution: str, fingerprints: Mapping[str, str]) -> None:
    """Add DVC's fingerprint to the records of the finished runs of an execution that have none."""
    for path in (RUNS / execution).glob(f"*/{RUN_FILE}"):
        with file_lock(path):
            run = read_json(path)
            known = fingerprints.get(run["name"])
            if run["status"] == "FINISHED" and FINGERPRINT not in run["tags"] and known:
                run["tags"][FINGERPRINT] = known
                write_json(path, run)


def send_fingerprints(client: Any, uri: str) -> None:
    """Tag MLflow's runs with the fingerprints that were recorded after they had ended there."""
    for path in sorted(RUNS.glob(f"*/*/{RUN_FILE}")):
        tags = read_json(path)["tags"]
        if FINGERPRINT not in tags:
            continue
        with _once(path.parent, "fingerprinted") as wanted:
            if wanted:
                client.set_tag(mirror(path.parent, client, uri), FINGERPRINT, tags[FINGERPRINT])


def close_parent(folder: Path, client: Any, uri: str) -> None:
    """Give the parent run of an execution that ended its report and its status."""
    with _once(folder, "closed") as wanted:
        if not wanted:
            return
        closing = read_json(folder / CLOSING_FILE)
        parent = mirror_execution(folder, client, uri)
        report = closing.get("report")
        if report and Path(report).is_file():
            client.log_artifact(parent, report)
        client.set_terminated(parent, closing["status"], closing["ended"])


@contextmanager
def _once(folder: Path, mark: str) -> Iterator[bool]:
    """Tell whether something is still to be sent of a run, and remember that it was, or that MLflow refused it."""
    path = folder / MIRROR_FILE
    wanted = not (path.exists() and read_json(path).get(mark))
    with leave_refused(folder):
        yield wanted
    if wanted:
        write_json(path, {**(read_json(path) if path.exists() else {}), mark: True})

"""The flow `headroom`: one Prefect task per DVC stage.

DVC decides what must run; Prefect brings order, retries, schedules and a view of it all, and keeps no cache of its
own. A stage starts when its parents have ended, beside others if it does not measure; one that times the machine has
it for itself.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

from prefect import Task, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.environment import prepare
from flows.graph import Graph, Stage, read_graph, status_of
from flows.lock import only_run
from flows.process import Ending, Kind, Processes
from flows.summary import (
    RunStatus,
    RunSummary,
    StageResult,
    StageStatus,
    key_metric,
    ladder_table,
    markdown,
    read_ladder,
    report_page,
    stage_cells,
)
from flows.tracking import Tracker, new_execution
from stages.core.artifacts import read_json, write_json
from stages.core.errors import UserError
from stages.core.ladder import headline
from stages.core.observe.progress import say
from stages.core.observe.tracking import EXECUTION_VARIABLE, RUNS, open_execution
from stages.core.params import load_params
from stages.core.stage import PARAMS

SUMMARY_FILE = "summary.json"
FAULT = "Fault"
"""Name of the state of a task that Prefect tries again."""
RETRIES = 2
RETRY_DELAYS = [2.0, 8.0]

_MLFLOW_STATUS = {"done": "FINISHED", "interrupted": "KILLED"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_BETWEEN_LOOKS = 0.2
# Never the limit: the run itself says how many stages go side by side.
_RUNNER: Any = ThreadPoolTaskRunner(max_workers=32)
_REASONS_SHOWN = 3
_RESTORE = ("its output is only gone from the workspace",)
_GOOD = ("ran", "cached")
_STAGE_STATUS: dict[Kind, StageStatus] = {
    "ran": "ran",
    "cached": "cached",
    "refused": "refused",
    "interrupted": "interrupted",
    "fault": "failed",
    "broken": "failed",
}


@flow(name="headroom", persist_result=False, task_runner=_RUNNER)
def headroom(stage: str | None = None, workers: int = 1, force: bool = False, wait: bool = False) -> State[Any]:
    """Bring the project up to date.

    Args:
        stage: build only what this stage needs, and it; null builds everything.
        workers: how many stages may run side by side.
        force: run the stages even if nothing changed.
        wait: for a run that is going to end, where it would otherwise be refused.
    """
    prepare()
    params = load_params(PARAMS)
    execution = os.environ.get(EXECUTION_VARIABLE) or new_execution()
    with only_run(wait), _execution(execution):
        open_execution(params)
        summary = _Run(read_graph(), stage, Tracker(execution, params), workers, force).build()
    return _final_state(summary)


@contextmanager
def _execution(name: str) -> Iterator[None]:
    """Name the execution in the environment, where the tracking of stages looks for it."""
    before = os.environ.get(EXECUTION_VARIABLE)
    os.environ[EXECUTION_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXECUTION_VARIABLE]


def read_summary(execution: str) -> dict[str, Any]:
    """Return the summary that a finished execution left."""
    summary: dict[str, Any] = read_json(RUNS / execution / SUMMARY_FILE)
    return summary


class _Run:
    """One pass over the graph."""

    def __init__(self, graph: Graph, target: str | None, tracker: Tracker, workers: int, force: bool):
        self._graph = graph
        self._stages = graph.up_to(target)
        self._tracker = tracker
        self._workers = workers
        self._force = force
        self._processes = Processes(side_by_side=workers > 1, mirrored=True)
        self._results: dict[str, StageResult] = {}
        self._ended: queue.Queue[str] = queue.Queue()
        self._metric = tracker.params.quality.metric

    def build(self) -> RunSummary:
        """Build every stage that must be built; return what became of each."""
        self._tracker.start()
        status, report = "FAILED", None
        try:
            summary = self._build()
            status = _MLFLOW_STATUS.get(summary.status, "FAILED")
            done = any(each.stage == "report" and each.status in ("ran", "cached") for each in summary.stages)
            report = report_page() if done else None
        finally:
            self._tracker.finish(status, report)
        return summary

    def _build(self) -> RunSummary:
        started = time.monotonic()
        with _stoppable(self._processes):
            self._schedule()
        results = [self._results[stage.name] for stage in self._stages]
        seconds = time.monotonic() - started
        summary = RunSummary(self._tracker.execution, _run_status(results), seconds, results, _ladder_if_whole())
        write_json(RUNS / summary.execution / SUMMARY_FILE, summary.to_dict())
        _publish(summary)
        return summary

    def _schedule(self) -> None:
        """Start what is ready, in the order of the graph, until nothing is left."""
        waiting = {stage.name: stage for stage in self._stages}
        running: dict[str, Stage] = {}
        futures: dict[str, PrefectFuture[Any]] = {}
        while waiting or running:
            self._skip_hopeless(waiting)
            for stage in self._startable(waiting, running):
                running[stage.name] = waiting.pop(stage.name)
                parents = [futures[parent] for parent in stage.parents]
                futures[stage.name] = self._task(stage).submit(stage.name, return_state=False, wait_for=parents)
                futures[stage.name].add_done_callback(partial(self._note_end, stage.name))
            if running:
                self._await_one(running)

    def _startable(self, waiting: dict[str, Stage], running: dict[str, Stage]) -> list[Stage]:
        """A measuring stage starts when nothing runs, and nothing starts beside it."""
        if any(stage.measures for stage in running.values()):
            return []
        ready = [stage for stage in waiting.values() if all(self._is_good(parent) for parent in stage.parents)]
        ordinary = [stage for stage in ready if not stage.measures]
        if ordinary:
            return ordinary[: self._workers - len(running)]
        return ready[:1] if not running else []

    def _is_good(self, name: str) -> bool:
        return name in self._results and self._results[name].status in _GOOD

    def _skip_hopeless(self, waiting: dict[str, Stage]) -> None:
        """Give up the stages whose parents came to nothing, and all of them once the flow is stopping."""
        for stage in list(waiting.values()):
            bad = [name for name in stage.parents if name in self._results and not self._is_good(name)]
            if bad or self._processes.stopping.is_set():
                del waiting[stage.name]
                reason = f"needs {', '.join(bad)}" if bad else "the run was stopped"
                self._results[stage.name] = StageResult(stage.name, "skipped", 0.0, "", reason)

    def _await_one(self, running: dict[str, Stage]) -> None:
        if self._processes.stopping.is_set():
            self._processes.forward()
        try:
            name = self._ended.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            return
        del running[name]
        missing = StageResult(name, "failed", 0.0, "", "Prefect did not run the task; see its log")
        self._results.setdefault(name, missing)

    def _note_end(self, name: str, _: object) -> None:
        self._ended.put(name)

    def _task(self, stage: Stage) -> Task[[str], State[Any]]:
        return Task(
            fn=self._build_stage,
            name=stage.name,
            task_run_name=stage.name,
            description=stage.description,
            tags={"measures"} if stage.measures else set(),
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=RETRIES,
            retry_delay_seconds=RETRY_DELAYS,
            retry_condition_fn=_is_fault,
        )

    def _build_stage(self, name: str) -> State[Any]:
        """Bring one stage up to date; runs in a thread of the task runner, once for each try."""
        stage = self._graph.stage(name)
        started = time.monotonic()
        ending = self._act(stage)
        return self._conclude(stage, ending, time.monotonic() - started)

    def _act(self, stage: Stage) -> Ending:
        if self._processes.stopping.is_set():
            return Ending("interrupted", "did not start")
        try:
            reasons = self._why(stage)
        except UserError as error:
            return Ending("refused", str(error))
        if not reasons:
            return Ending("cached", "nothing changed")
        logger = get_run_logger()

        def show(line: str) -> None:
            say(line)
            logger.info(line)

        if reasons == _RESTORE:
            show(f"{stage.name}: unchanged, brought back from DVC's cache")
            return self._processes.checkout(stage.name, self._tracker.execution, show)
        if not stage.always:
            show(f"{stage.name}: starts, because {'; '.join(reasons[:_REASONS_SHOWN])}")
        return self._processes.repro(stage.name, self._tracker.execution, show, self._force)

    def _why(self, stage: Stage) -> tuple[str, ...]:
        """Why a stage must run; nothing if it need not."""
        if self._force or stage.always:
            return ("it was asked for",)
        status = status_of(stage.name)
        return _RESTORE if status.state == "restore" else status.reasons

    def _conclude(self, stage: Stage, ending: Ending, seconds: float) -> State[Any]:
        status = _STAGE_STATUS[ending.kind]
        metric = key_metric(stage, self._metric) if status in _GOOD else ""
        self._results[stage.name] = StageResult(stage.name, status, round(seconds, 2), metric, ending.message)
        if ending.kind == "ran":
            self._tracker.ran()
            return Completed(message=f"ran in {seconds:.1f} s")
        if ending.kind == "cached":
            self._tracker.reused(stage)
            return Completed(name="Cached", message=ending.message)
        if ending.kind == "interrupted":
            return Cancelled(message=ending.message)
        say(f"{stage.name}: {ending.message}")
        return Failed(name=FAULT if ending.kind == "fault" else ending.kind.capitalize(), message=ending.message)


@contextmanager
def _stoppable(processes: Processes) -> Iterator[None]:
    """Take Ctrl-C and polite kills: the first stops the stages, which save their state; the second ends them."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no signals
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if processes.stopping.is_set():
            processes.kill()
            return
        processes.stopping.set()
        say("stopping; the stages save their state, the next run goes on from there (again: end them at once)")

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect which failed tasks to try again: those whose stage met a fault of the machine or the network."""
    return state.name == FAULT


def _run_status(results: list[StageResult]) -> RunStatus:
    found = {result.status for result in results}
    for status in ("interrupted", "failed", "refused"):
        if status in found:
            return cast(RunStatus, status)
    return "interrupted" if "skipped" in found else "done"


def _ladder_if_whole() -> list[dict[str, Any]]:
    """The ladder; evaluations of an older Headroom that lack a value are named and leave none."""
    try:
        return [row.to_dict() for row in read_ladder()]
    except UserError as error:
        say(str(error))
        return []


def _publish(summary: RunSummary) -> None:
    """Show the tables as artifacts of the flow run."""
    if summary.status == "interrupted":
        return
    create_table_artifact(stage_cells(summary), key="headroom-run", description=f"Run {summary.execution}")
    if summary.ladder:
        rows = read_ladder()
        text = f"{markdown(ladder_table(rows))}\n\n{headline(rows)}\n"
        create_markdown_artifact(text, key="headroom-ladder", description="Performance ladder")


def _final_state(summary: RunSummary) -> State[Any]:
    counts = ", ".join(
        f"{count} {status}" for status, count in Counter(result.status for result in summary.stages).items()
    )
    message = f"{summary.status}: {counts}"
    if summary.status == "done":
        return Completed(message=message)
    return Cancelled(message=message) if summary.status == "interrupted" else Failed(message=message)

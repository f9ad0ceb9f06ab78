"""`headroom run`: checks everything that can be wrong before anything starts, then runs the flow in this process."""

from __future__ import annotations

import os
from typing import Any

from flows.graph import read_graph
from flows.lock import only_run
from flows.server import start_temporary_server
from flows.summary import RunSummary, StageResult
from stages.core.errors import UserError
from stages.core.observe.tracking import EXECUTION_VARIABLE
from stages.core.params import load_params
from stages.core.stage import PARAMS


def execute(stage: str | None, workers: int, force: bool, wait: bool) -> RunSummary:
    """Run the flow and return what became of it.

    Raises:
        UserError: if params or graph are not valid, there is no such stage, or another run is going.
    """
    graph = read_graph()
    load_params(PARAMS)
    graph.up_to(stage)
    with only_run(wait):
        server = start_temporary_server()
        from flows.build import headroom, read_summary
        from flows.tracking import new_execution

        execution = os.environ.setdefault(EXECUTION_VARIABLE, new_execution())
        if server is not None:
            server.join()
        state = headroom(stage=stage, workers=workers, force=force, return_state=True)
        _raise_mistakes(state)
    summary = read_summary(execution)
    return RunSummary(**{**summary, "stages": [StageResult(**result) for result in summary["stages"]]})


def _raise_mistakes(state: Any) -> None:
    """Raise what ended the flow before it could sum up; a failed stage is no such thing."""
    problem = getattr(state.data, "result", state.data)
    if isinstance(problem, BaseException):
        raise problem
    if state.is_crashed():
        raise UserError(f"the flow crashed: {state.message}")

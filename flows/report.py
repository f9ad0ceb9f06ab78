"""`headroom report`: the page as it is, rebuilt where the report alone is behind."""

from __future__ import annotations

from pathlib import Path

from flows.graph import forecast
from flows.process import Processes
from flows.summary import report_page
from flows.tracking import new_execution
from stages.core.errors import UserError
from stages.core.observe.progress import say

STAGE = "report"


def current_report() -> Path:
    """Return the path of the report, rebuilt first if nothing but the report changed.

    Raises:
        UserError: if there is no report yet, or it cannot be built.
    """
    _, forecasts = forecast(STAGE)
    behind = [name for name, found in forecasts.items() if found.outlook in ("run", "probably")]
    if behind == [STAGE] or forecasts[STAGE].outlook == "restore":
        _rebuild(restore=forecasts[STAGE].outlook == "restore")
    elif behind and report_page().exists():
        say(f"this is the last report; {len(behind)} stages changed since ({', '.join(behind[:4])}): `headroom run`")
    if not report_page().exists():
        raise UserError(f"{report_page()}: no report yet; `headroom run` makes it")
    return report_page()


def _rebuild(restore: bool) -> None:
    processes = Processes()
    make = processes.checkout if restore else processes.repro
    ending = make(STAGE, new_execution(), show=say)
    if ending.kind not in ("ran", "cached"):
        raise UserError(f"{STAGE}: {ending.message}")

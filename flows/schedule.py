"""The flow on a schedule: a deployment served from this process, seen in the Prefect UI."""

from __future__ import annotations

import os
import signal

from flows.environment import make_prefect_folder, prepare
from flows.server import API_URL, LOCAL_API_URL, check_server
from stages.core.errors import UserError
from stages.core.observe.progress import say

DEPLOYMENT = "scheduled"

_SHORTEST_INTERVAL = 60


def check_schedule(cron: str | None, interval: int | None) -> None:
    """Make sure that there is one schedule and that it can be kept.

    Args:
        cron: five fields, such as `0 2 * * *`.
        interval: seconds between two starts.

    Raises:
        UserError: if there is none, there are both, or it makes no sense.
    """
    if (cron is None) == (interval is None):
        raise UserError('schedule: give either --cron "0 2 * * *" or --interval 3600')
    if interval is not None and interval < _SHORTEST_INTERVAL:
        raise UserError(f"--interval {interval}: shorter than a minute; give seconds, such as 3600 for every hour")
    if cron is not None:
        _check_cron(cron)


def serve(cron: str | None, interval: int | None, stage: str | None, workers: int) -> None:
    """Serve the flow until interrupted; runs that come due while one is going wait for it.

    Raises:
        UserError: if no server is named or it does not answer.
    """
    if not os.environ.get(API_URL):
        raise UserError(
            f"{API_URL}: not set, and a schedule needs a Prefect server that stays; "
            f"start one with `make ui`, then `export {API_URL}={LOCAL_API_URL}`"
        )
    check_server()
    from flows.build import headroom

    when = f"at {cron!r}" if cron else f"every {interval} s"
    say(f"serving the flow {when}; Ctrl-C ends it and pauses the schedule")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Prefect's runner listens for these itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    headroom.serve(
        name=DEPLOYMENT,
        cron=cron,
        interval=interval,
        parameters={"stage": stage, "workers": workers, "wait": True},
        limit=1,
        print_starting_message=False,
    )


def _check_cron(cron: str) -> None:
    prepare()
    make_prefect_folder()
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError:
        raise UserError(
            f'--cron "{cron}": is no cron expression; give five fields, minute, hour, day of month, month and day of '
            'week, such as "0 2 * * *" for two at night'
        ) from None

"""The Prefect server that a run talks to: the one at PREFECT_API_URL, or a temporary one of its own."""

from __future__ import annotations

import os
import signal
import threading
import urllib.error
import urllib.request

from flows.environment import make_prefect_folder
from stages.core.errors import UserError

API_URL = "PREFECT_API_URL"
LOCAL_API_URL = "http://127.0.0.1:4200/api"

_SECONDS_TO_ANSWER = 10.0


def start_temporary_server() -> threading.Thread | None:
    """Begin to start a temporary server where no other is named; join the thread before the flow starts.

    It starts in a thread that takes no Ctrl-C, which the server's process inherits: on a terminal Ctrl-C reaches
    every process of the group, and the flow still has to tell the server how it ended.

    Raises:
        UserError: if PREFECT_API_URL names a server that does not answer.
    """
    make_prefect_folder()
    if os.environ.get(API_URL):
        check_server()
        return None
    thread = threading.Thread(target=_start, name="prefect-server", daemon=True)
    thread.start()
    return thread


def check_server() -> None:
    """Make sure that the server at PREFECT_API_URL answers.

    Raises:
        UserError: if it does not.
    """
    url = os.environ[API_URL]
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_SECONDS_TO_ANSWER):
            return
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{API_URL}: no Prefect server answers at {url} ({reason}); start one with `make ui`, or unset {API_URL}"
        ) from None


def _start() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.hello()

"""Work in a fresh process: its memory is its own, and if it is killed the stage lives on.

The caller names a module; the module's main calls `answer_request` with a function from request to reply. Both are
JSON, and travel in files because libraries print to stdout as they please.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

_PROJECT = Path(__file__).parents[2]


class FreshProcessError(RuntimeError):
    """The process ended without a reply; the message is one line."""


def ask_fresh_process(module: str, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Run `python -m module` on a request and return its reply.

    Args:
        module: whose main calls `answer_request`.
        request: that can be JSON.
        timeout: in seconds, after which the process is killed.

    Raises:
        FreshProcessError: if the process crashes, is killed, refuses the request or takes too long.
    """
    paths = [str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="headroom-") as name:
        asked, answered = Path(name, "request.json"), Path(name, "reply.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", module, str(asked), str(answered)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise FreshProcessError(f"no reply within {timeout:.0f} s") from None
        if done.returncode != 0 or not answered.exists():
            raise FreshProcessError(_reason(done))
        reply: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return reply


def answer_request(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Main of a module that `ask_fresh_process` names: read the request, work, write the reply, exit."""
    asked, answered = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        reply = work(json.loads(asked.read_text(encoding="utf-8")))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    answered.write_text(json.dumps(reply), encoding="utf-8")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no message"
    if done.returncode >= 0:
        return last
    name = signal.Signals(-done.returncode).name
    return "killed, most likely for want of memory" if name == "SIGKILL" else f"crashed with {name}: {last}"

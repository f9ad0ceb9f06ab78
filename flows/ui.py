"""`python -m flows.ui`, what `make ui` runs: the MLflow UI and a Prefect server on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from flows.environment import make_prefect_folder, prepare
from flows.server import API_URL
from stages.core.artifacts import STATE
from stages.core.errors import UserError
from stages.core.observe.progress import say
from stages.core.observe.tracking import tracking_uri
from stages.core.params import load_params
from stages.core.stage import PARAMS

HOST = "127.0.0.1"
MLFLOW_PORT = "MLFLOW_PORT"
PREFECT_PORT = "PREFECT_SERVER_API_PORT"

_SECONDS_TO_START = 90.0
_SECONDS_TO_STOP = 3.0


def main() -> int:
    """Serve both until interrupted; return the exit code."""
    prepare()
    make_prefect_folder()
    ports = {
        MLFLOW_PORT: int(os.environ.get(MLFLOW_PORT, "5000")),
        PREFECT_PORT: int(os.environ.get(PREFECT_PORT, "4200")),
    }
    try:
        uri = tracking_uri(load_params(PARAMS))
        commands = _commands(uri, ports)
    except UserError as error:
        say(f"ui: {error}")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        say("starting the servers")
        servers.extend(_start(command, ports[PREFECT_PORT]) for command in commands)
        return _watch(servers, uri, ports)
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(servers)


def _commands(uri: str, ports: dict[str, int]) -> list[list[str]]:
    """The servers to start: MLflow where the runs lie in files or a database, not where a server has them already."""
    commands = [["prefect", "server", "start", "--host", HOST, "--port", str(ports[PREFECT_PORT])]]
    if not uri.startswith(("http://", "https://", "databricks")):
        store = ["--backend-store-uri", uri, "--host", HOST, "--port", str(ports[MLFLOW_PORT]), "--workers", "1"]
        commands.append(["mlflow", "server", *store])
    for name, port in list(ports.items())[-len(commands) :]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((HOST, port)) == 0:
                raise UserError(f"port {port} is taken; end what listens there, or `make ui {name}={port + 1}`")
    return commands


def _start(command: list[str], prefect_port: int) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own: Ctrl-C reaches this process alone, which then ends both in order."""
    tool = Path(sys.executable).with_name(command[0])
    api = f"http://{HOST}:{prefect_port}/api"
    environment = {**os.environ, API_URL: api, "PREFECT_UI_API_URL": api}
    log = _log(command[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(tool), *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _log(name: str) -> Path:
    """Where a server's own words go."""
    return STATE / f"ui-{name}.log"


def _watch(servers: list[subprocess.Popen[bytes]], uri: str, ports: dict[str, int]) -> int:
    """Say when both answer, then wait until one of them ends, which is a failure."""
    started, told = time.monotonic(), False
    chosen = [ports[PREFECT_PORT], *([ports[MLFLOW_PORT]] if len(servers) > 1 else [])]
    while True:
        ended = next((server for server in servers if server.poll() is not None), None)
        if ended is not None:
            name = "prefect" if ended is servers[0] else "mlflow"
            say(f"ui: {name} ended with exit code {ended.returncode}; see {_log(name)}")
            return 1
        if not told and all(_answers(port) for port in chosen):
            told = True
            _tell(uri, ports, with_mlflow=len(servers) > 1)
        if not told and time.monotonic() - started > _SECONDS_TO_START:
            say(f"ui: no answer within {_SECONDS_TO_START:.0f} s; see {_log('prefect')} and {_log('mlflow')}")
            return 1
        time.sleep(0.3)


def _tell(uri: str, ports: dict[str, int], with_mlflow: bool) -> None:
    prefect = f"http://{HOST}:{ports[PREFECT_PORT]}"
    say(f"MLflow:  {f'http://{HOST}:{ports[MLFLOW_PORT]}' if with_mlflow else uri}")
    say(f"Prefect: {prefect}")
    say(f"In other terminals, so that runs and schedules use this server: export {API_URL}={prefect}/api")
    say("Ctrl-C stops both.")


def _stop(servers: list[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        _signal_group(server, signal.SIGTERM)
    for server in servers:
        try:
            server.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            _signal_group(server, signal.SIGKILL)
            server.wait()
        _signal_group(server, signal.SIGKILL)  # what a server left behind in its session


def _signal_group(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(server.pid, number)
    except ProcessLookupError:
        return


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

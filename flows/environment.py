"""The environment that Headroom's tools run in: no telemetry, quiet logs, everything kept inside the project.

Every value is a default: what the user has set goes first. `python -m flows.environment COMMAND ...` runs a tool, such
as `prefect` or `mlflow`, with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from stages.core.artifacts import ARTIFACTS

PREFECT_FOLDER = ARTIFACTS / ".prefect"

_DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the flow speaks for itself; the server gets every line
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start makes its database
    "PREFECT_CLI_PROMPT": "false",
}


def prepare() -> None:
    """Set the defaults, before any of the tools is imported."""
    for name, value in defaults().items():
        os.environ.setdefault(name, value)
    folder = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if paths[0] != folder:  # so that `python` in dvc.yaml is this interpreter
        os.environ["PATH"] = os.pathsep.join([folder, *paths])


def defaults() -> dict[str, str]:
    """Name every variable with the value it has unless the user set another."""
    return {**_DEFAULTS, "PREFECT_HOME": str(PREFECT_FOLDER.resolve())}


def make_prefect_folder() -> None:
    """Create the folder that Prefect keeps its settings and database in, before Prefect is imported."""
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Replace this process by the tool that the command line names."""
    prepare()
    make_prefect_folder()
    tool = Path(sys.executable).with_name(sys.argv[1])
    os.execv(tool, [str(tool), *sys.argv[2:]])


if __name__ == "__main__":
    main()

"""The process in which a peer makes its model: `python -m benchmarks.peers.compress REQUEST`.

Its whole time counts, imports included: that is what a user of the peer waits for.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.peers.task import Task


def main() -> None:
    """Compress as the request says."""
    request = json.loads(sys.argv[1])
    task = Task.load(Path(request["task"]))
    out = Path(request["out"])
    importlib.import_module(f"benchmarks.peers.{request['peer']}").compress(request["variant"], task, out)


if __name__ == "__main__":
    main()

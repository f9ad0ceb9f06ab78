"""One training in a process of its own: `python -m benchmarks.methods.job FOLDER`.

FOLDER holds `request.json` (params and input folders) and gets `answer.json`. A job that was stopped goes on from its
last saved state when it is started again.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stages.core.artifacts import read_json, write_json
from stages.core.checkpoints import load_model
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_pad_id
from stages.core.judging import predict_logits
from stages.core.observe.tracking import SilentRecord
from stages.core.params import parse_params
from stages.core.stage import StageRun
from stages.core.tasks import get_task
from stages.finetune.__main__ import run_finetune

REQUEST, ANSWER, SPENT = "request.json", "answer.json", "spent.json"
_QUALITY = ("accuracy", "f1_macro")
_INTERRUPTED = 130


def main() -> int:
    """Train, judge, answer."""
    folder = Path(sys.argv[1])
    try:
        write_json(folder / ANSWER, _answer(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _answer(folder: Path) -> dict[str, Any]:
    request = read_json(folder / REQUEST)
    params = parse_params(request["params"], REQUEST)
    inputs = {role: Path(path) for role, path in request["inputs"].items()}
    staging = folder / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    run = StageRun("finetune", params, inputs, staging, folder / "state", SilentRecord())
    torch.manual_seed(params.seed)
    with _clocked(folder / SPENT):
        metrics = run_finetune(run)
    model, task, test = load_model(staging / "model"), get_task(params.task.kind), load_examples(inputs["data"], "test")
    logits = predict_logits(model, test.input_ids, load_pad_id(inputs["data"]))
    spent = read_json(folder / SPENT)
    return {
        "validation": {name: metrics["validation"][name] for name in _QUALITY},
        "test": {name: task.score(name, logits, test.labels) for name in _QUALITY},
        "best_epoch": metrics["best_epoch"],
        "minutes": spent["wall"] / 60.0,
        "processor_minutes": spent["processor"] / 60.0,
    }


@contextmanager
def _clocked(path: Path) -> Iterator[None]:
    """Add the seconds spent to those of earlier starts of the same job."""
    before = read_json(path) if path.exists() else {"wall": 0.0, "processor": 0.0}
    wall, processor = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        spent = {"wall": time.monotonic() - wall, "processor": time.process_time() - processor}
        write_json(path, {name: before[name] + seconds for name, seconds in spent.items()})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

"""A stand-in for a stage: reads its inputs, writes one folder. Behaves badly when a file called `behave-NAME` says so.

python stub_stage.py NAME --out FOLDER [INPUT ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    name, inputs = sys.argv[1], sys.argv[4:]
    if Path(f"track-{name}").exists():
        return _tracked(name, Path(sys.argv[3]))
    out = Path(sys.argv[3])
    with Path("trace.jsonl").open("a") as trace:
        trace.write(json.dumps({"stage": name, "event": "start", "time": time.time()}) + "\n")
    order = Path(f"behave-{name}")
    behaviour = order.read_text().split() if order.exists() else []
    code = _behave(name, behaviour, order)
    if code:
        return code
    out.mkdir(parents=True, exist_ok=True)
    content = "".join(sorted(Path(path).read_text() for path in map(_file, inputs)))
    (out / "made.txt").write_text(f"{name}({content})")
    (out / "measured.json").write_text(json.dumps({"wall_seconds": 1.5, "peak_memory_mb": 10.0}))
    (out / "manifest.json").write_text(json.dumps({"files": {"made.txt": {"sha256": name, "bytes": 1}}}))
    with Path("trace.jsonl").open("a") as trace:
        trace.write(json.dumps({"stage": name, "event": "end", "time": time.time()}) + "\n")
    return 0


def _tracked(name: str, out: Path) -> int:
    """A stage that keeps the real contract, with its records and its runs in MLflow."""
    from stages.core.artifacts import write_json, write_manifest
    from stages.core.params import load_params
    from stages.core.stage import open_stage

    order = Path(f"behave-{name}")
    with open_stage(name, load_params(Path("params.yaml")), {}, out) as run:
        run.log(1, loss=0.5)
        _behave(name, order.read_text().split() if order.exists() else [], order)
        Path(f"imported-{name}").write_text("mlflow" if "mlflow" in sys.modules else "nothing slow")
        write_json(run.staging / "metrics.json", {"validation": {"accuracy": 0.5}})
        write_manifest(run.staging)
    return 0


def _file(path: str) -> str:
    return f"{path}/made.txt" if Path(path).is_dir() else path


def _behave(name: str, behaviour: list[str], order: Path) -> int:
    match behaviour:
        case ["exit", code]:
            print(f"{name}: input.txt: is bad; make it good", file=sys.stderr)
            return int(code)
        case ["die", "once"]:
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        case ["wait", file]:
            deadline = time.monotonic() + 120
            while not Path(file).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        case ["sleep", seconds]:
            try:
                time.sleep(float(seconds))
            except KeyboardInterrupt:
                Path(f"saved-{name}").write_text("state")
                print(f"{name}: interrupted; the next run goes on from here", file=sys.stderr)
                return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Command line: `python -m benchmarks.methods --help`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import yaml

from benchmarks.calls import repeatable_call
from benchmarks.environments import last_complaint
from benchmarks.markers import put_between
from benchmarks.methods.declared import METHODS, Method, changed, choose
from benchmarks.methods.job import ANSWER, REQUEST
from benchmarks.methods.table import render
from benchmarks.workers import ROOT
from stages.core.artifacts import ARTIFACTS, digest, read_json, text_sha256, write_json, write_manifest
from stages.core.errors import UserError
from stages.core.hardware import describe_hardware, usable_processors
from stages.core.observe.progress import say
from stages.core.params import parse_params

_INPUTS = {"model": "pretrain/model", "data": "tokenize/data", "lexicon": "acquire/lexicon", "corpus": "clean/corpus"}
"""Folders of a finished run that the stage may ask for, by role."""
_RESULTS, _TABLE, _LOG = "results.jsonl", "table.md", "log.txt"
_FOLDERS = ("artifacts", "work", "page")
_MARKER = "bench-methods"
_TRAIN = "train.parquet"
_SECONDS_TO_STOP = 60
_INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """A training to do."""

    task: str
    method: Method
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    base: str
    """Digest of inputs and params without the method and the seed."""
    key: str
    """Tells trainings apart whose results differ."""
    asked: Mapping[str, Any]
    """How the table tells of it: `command` and `texts`."""

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.params["seed"])


class Processes:
    """The running jobs, so that all can be stopped."""

    def __init__(self) -> None:
        self.stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int | None:
        """Run a command to its end; None where it was not started, because all are being stopped."""
        with log.open("wb") as stream:
            with self._lock:
                if self.stopping:
                    return None
                process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=log.parent, env=environment)
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Ask all to save their state and end; end those that do not in time."""
        with self._lock:
            self.stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    """Train what is missing and render the table."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failures = _run(arguments)
    except UserError as error:
        print(f"benchmarks.methods: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.methods: interrupted; the next call goes on from here", file=sys.stderr)
        return _INTERRUPTED
    for failure in failures:
        say(f"failed: {failure}")
    return 1 if failures else 0


def _run(arguments: argparse.Namespace) -> list[str]:
    work, page = Path(arguments.work).absolute(), Path(arguments.page)
    if not page.is_file():
        raise UserError(f"{page}: no such file; start in the project's folder, or name another --page")
    put_between(page.read_text(encoding="utf-8"), _MARKER, "", str(page))
    work.mkdir(parents=True, exist_ok=True)
    jobs = plan(arguments)
    done = {line["key"] for line in read_lines(work / _RESULTS)}
    missing = [job for job in jobs if job.key not in done]
    say(f"{len(jobs)} trainings, {len(jobs) - len(missing)} of them done before")
    processes = Processes()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            failures = list(pool.map(lambda job: train(job, work, arguments.jobs, processes), missing))
        except KeyboardInterrupt:
            processes.stop()
            raise
        finally:
            _write_table(work, page)
    return [failure for failure in failures if failure]


def plan(arguments: argparse.Namespace) -> list[Job]:
    """List the trainings: all methods with the first seed, then with the second, and so on.

    Raises:
        UserError: if the run's folders or a param are missing.
    """
    raw = changed(yaml.safe_load(Path(arguments.params).read_text(encoding="utf-8")), {})
    if arguments.epochs:
        raw = changed(raw, {"finetune.epochs": arguments.epochs})
    found = {role: Path(arguments.artifacts).absolute() / path for role, path in _INPUTS.items()}
    inputs = {role: folder for role, folder in found.items() if folder.exists()}
    for role in ("model", "data"):
        if role not in inputs:
            raise UserError(f"{found[role]}: no such folder; name the artifacts of a finished run with --artifacts")
    if arguments.texts is not None:
        inputs["data"] = shorten(inputs["data"], arguments.texts, Path(arguments.work).absolute())
    folders = {role: str(folder) for role, folder in inputs.items()}
    base = _digest({**raw, "seed": 0}, arguments.params, [digest(folder) for folder in inputs.values()])
    asked = {"command": repeatable_call(_parser(), arguments, _FOLDERS), "texts": arguments.texts}
    jobs = []
    for seed in range(raw["seed"], raw["seed"] + arguments.seeds):
        for method in choose(arguments.only):
            params = {**method.params(raw), "seed": seed}
            key = _digest(params, f"{arguments.params}, {method.name}", [arguments.task_name, base])
            jobs.append(Job(arguments.task_name, method, params, folders, base, key, asked))
    return jobs


def shorten(data: Path, texts: int, work: Path) -> Path:
    """Copy tokenized data with a random choice of its training texts, the same one at every call; return the copy.

    Raises:
        UserError: if there are fewer.
    """
    table = pyarrow.parquet.read_table(data / _TRAIN)
    if not 0 < texts <= len(table):
        raise UserError(f"--texts {texts}: there are {len(table)} training texts; take from 1 to as many")
    folder = work / "shortened-data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data, folder)
    chosen = numpy.sort(numpy.random.default_rng(0).permutation(len(table))[:texts])
    pyarrow.parquet.write_table(table.take(chosen), folder / _TRAIN)
    write_manifest(folder)
    return folder


def _digest(raw: Mapping[str, Any], where: str, others: Sequence[str]) -> str:
    """Digest of what decides a training; its params are validated on the way, so that mistakes show at once."""
    params = parse_params(raw, where)
    decisive = params.model_dump_json(include={"seed", "task", "quality", "training", "finetune"})
    return text_sha256("\n".join([decisive, *others]))[:16]


def train(job: Job, work: Path, side_by_side: int, processes: Processes) -> str | None:
    """Run a job in a process of its own and add its line to the results; return what went wrong."""
    folder = work / "jobs" / f"{job.method.name}-{job.seed}-{job.key}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, {"params": job.params, "inputs": job.inputs})
    threads = max(1, len(usable_processors()) // side_by_side)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.methods.job", str(folder)]
    code = processes.run(command, folder / _LOG, environment)
    if processes.stopping:
        return None
    if code != 0:
        complaint = last_complaint((folder / _LOG).read_text(encoding="utf-8", errors="replace"))
        return f"{job.method.name}, seed {job.seed}: {complaint}"
    answer = read_json(folder / ANSWER)
    _add_line(
        work / _RESULTS,
        {
            "key": job.key,
            "base": job.base,
            "task": job.task,
            "method": job.method.name,
            "seed": job.seed,
            "epochs": job.params["finetune"]["epochs"],
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "threads": threads,
            **job.asked,
            **answer,
        },
    )
    shutil.rmtree(folder)
    say(
        f"{job.task}, {job.method.name}, seed {job.seed}: test accuracy {answer['test']['accuracy']:.4f}, "
        f"{answer['minutes']:.1f} minutes"
    )
    return None


_RESULTS_LOCK = threading.Lock()


def _add_line(path: Path, line: Mapping[str, Any]) -> None:
    with _RESULTS_LOCK, path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Results so far; a last line that was cut off by a kill does not count."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _write_table(work: Path, page: Path) -> None:
    lines = read_lines(work / _RESULTS)
    if lines:
        text = render(lines, describe_hardware())
        (work / _TABLE).write_text(text, encoding="utf-8")
        page.write_text(put_between(page.read_text(encoding="utf-8"), _MARKER, text, str(page)), encoding="utf-8")
        say(f"{len(lines)} trainings in {work / _TABLE} and {page}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description="Fine-tune once a method and seed, from the pretrained checkpoint of a finished run, and compare "
        "the models on its test split. Writes a table between the marks of docs/training.md. Methods: "
        + ", ".join(method.name for method in METHODS),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task-name", default="questions", help="of the task, as the table calls it")
    parser.add_argument("--artifacts", default=str(ARTIFACTS), help="artifacts folder of a finished run of the task")
    parser.add_argument("--params", default="params.yaml", help="params of the task")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method, from the params' seed on")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; plain is always among them")
    parser.add_argument("--epochs", type=int, default=None, help="instead of those of the params")
    parser.add_argument("--texts", type=int, default=None, help="so many training texts, chosen at random, not all")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side; they share the processors")
    parser.add_argument("--work", default=str(ARTIFACTS / "benchmarks" / "methods"), help="for results and table")
    parser.add_argument("--page", default="docs/training.md", help=f"page with the marks {_MARKER}, to write into")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A small project of stub stages in a temporary git and DVC repository."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.environment import defaults
from stages.core.observe.tracking import open_client

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_stage.py")

# The names are those of real stages where the flow looks for them: report, register, variants.
GRAPH = """
vars:
  - variants: [small, large]
stages:
  fingerprint:
    cmd: python stub_stage.py fingerprint --out artifacts/fingerprint outside.txt
    always_changed: true
    outs: [artifacts/fingerprint/made.txt]
  acquire:
    desc: collect
    cmd: python stub_stage.py acquire --out artifacts/acquire input.txt
    deps: [input.txt, artifacts/fingerprint/made.txt]
    params: [seed]
    outs:
      - artifacts/acquire: {persist: true}
  export:
    foreach: ${variants}
    do:
      desc: the ${item} model
      cmd: python stub_stage.py export@${item} --out artifacts/export/${item} artifacts/acquire
      deps: [artifacts/acquire]
      params: [export]
      outs:
        - artifacts/export/${item}: {persist: true}
  evaluate:
    foreach: ${variants}
    do:
      cmd: python stub_stage.py evaluate@${item} --out artifacts/evaluate/${item} artifacts/export/${item}
      deps: ["artifacts/export/${item}"]
      outs:
        - artifacts/evaluate/${item}: {persist: true}
      meta: {measures: true}
  report:
    desc: one page
    cmd: python stub_stage.py report --out artifacts/report artifacts/evaluate/small artifacts/evaluate/large
    deps: [artifacts/evaluate/small, artifacts/evaluate/large]
    outs:
      - artifacts/report: {persist: true}
"""


class Project:
    """A temporary project; commands run in it as a user would type them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def headroom(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            env=environment(**settings),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            env=environment(),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            env=environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    def trace(self) -> list[tuple[str, str]]:
        path = self.folder / "trace.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line["stage"], line["event"]) for line in map(json.loads, lines)]

    def started(self) -> list[str]:
        """Stages that started, in order, but for the one that always does."""
        return [stage for stage, event in self.trace() if event == "start" and stage != "fingerprint"]

    def forget_trace(self) -> None:
        (self.folder / "trace.jsonl").unlink()

    def remove(self, path: str) -> None:
        shutil.rmtree(self.folder / path)

    def track(self, stage: str) -> None:
        (self.folder / f"track-{stage}").touch()

    def behave(self, stage: str, how: str) -> None:
        (self.folder / f"behave-{stage}").write_text(how)


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    kept.pop("HEADROOM_EXECUTION", None)
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **settings}


def make_project(folder: Path) -> Project:
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "input.txt").write_text("input")
    (folder / "outside.txt").write_text("outside")
    (folder / ".gitignore").write_text("/artifacts/\n")
    shutil.copy(STUB, folder)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "presets").mkdir()
    shutil.copy(ROOT / "params.yaml", folder / "presets" / "questions.yaml")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    project = Project(folder)
    project.dvc("init", "-q")
    return project


@pytest.fixture(scope="session")
def project_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project")).folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_template: Path) -> Project:
    """A project in which nothing ran yet, as the working directory."""
    shutil.copytree(project_template, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)
    return Project(tmp_path)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder, with nothing set from outside; what `prepare` sets is undone after the test."""
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "HEADROOM_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in defaults().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture(scope="session")
def built_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("built"))
    project.dvc("repro")
    project.forget_trace()
    return project.folder


@pytest.fixture
def built(project: Project, built_template: Path) -> Project:
    """A project in which everything is up to date."""
    shutil.rmtree(project.folder / ".dvc")
    shutil.copytree(built_template, project.folder, dirs_exist_ok=True)
    return project


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of the tests' own, for flows that run in this process."""
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A folder with params and an empty default MLflow database, as the working directory."""
    enter(tmp_path, monkeypatch)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    database = tmp_path / "artifacts" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    shutil.copy(empty_database, database)
    return tmp_path

"""The whole pipeline on the tiny preset, in a repository of its own, twice.

One run is shared by all tests here; it takes a few minutes, since every stage is a process of its own, as in use.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifacts import digest, verify

PROJECT = Path(__file__).parents[1]
VARIANTS = ["finetune", "distill", "prune", "quantize", "quantize_finetuned"]
STAGES = [
    *["fingerprint", "acquire", "clean", "tokenize", "pretrain", "latency_table", *VARIANTS],
    *[f"export@{variant}" for variant in VARIANTS],
    "cascade",
    *[f"{stage}@{variant}" for stage in ("evaluate", "robustness") for variant in (*VARIANTS, "cascade")],
    "explain",
    *["deploy_check", "review", "history", "report", "register"],
]
pytestmark = pytest.mark.timeout(1800)


class Repository:
    """A clone of the project with the tiny preset."""

    def __init__(self, folder: Path):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
        )
        for name in listed.stdout.splitlines():
            if (PROJECT / name).is_file() and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PROJECT / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        for command in ("git init -q", "git add -A", "git commit -qm start"):
            identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
            program, *rest = command.split()
            subprocess.run([program, *identity, *rest], cwd=folder, check=True)

    def run(self, *arguments: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `headroom`."""
        return self.call([sys.executable, "-m", "flows.cli", *arguments], check, text)

    def call(self, command: list[str], check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run any command in the repository, with this interpreter first on the path."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HEADROOM_EXECUTION"):
            environment.pop(name, None)
        done = subprocess.run(
            command, cwd=self.folder, env=environment, input=text, capture_output=True, text=True, timeout=1500
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    def metrics(self, stage: str) -> dict[str, Any]:
        """Read a stage's metrics."""
        found: dict[str, Any] = json.loads((self.folder / "artifacts" / stage / "metrics.json").read_text())
        return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository after its first run."""
    repository = Repository(tmp_path_factory.mktemp("project"))
    repository.run("use", "tiny", "--force")
    summary = json.loads(repository.run("run", "--json").stdout)
    assert {stage["stage"]: stage["status"] for stage in summary["stages"]} == dict.fromkeys(STAGES, "ran")
    return repository


def test_every_stage_left_a_whole_output(repository: Repository) -> None:
    artifacts = repository.folder / "artifacts"
    outputs = {path.parent for pattern in ("*", "*/*") for path in artifacts.glob(f"{pattern}/manifest.json")}
    # The files of the fingerprint are outputs of their own.
    wanted = {artifacts / stage.replace("@", "/") for stage in STAGES if stage != "fingerprint"}
    assert wanted <= outputs
    assert len(outputs) >= len(STAGES) - 1
    for folder in outputs:
        verify(folder)


def test_the_model_learned_and_shrank(repository: Repository) -> None:
    parameters = [repository.metrics(stage)["parameters"] for stage in ("finetune", "distill", "prune")]
    assert parameters == sorted(parameters, reverse=True)
    assert len(set(parameters)) == 3
    quality = repository.metrics("evaluate/finetune")["quality"]["accuracy"]
    assert quality > 0.35  # the largest class has 18 %
    language = repository.metrics("pretrain")
    assert language["after"]["heldout_loss"] < language["before"]["heldout_loss"]
    sizes = [repository.metrics(f"evaluate/{name}")["size"]["model_bytes"] for name in ("finetune", "quantize")]
    assert sizes[1] < sizes[0]


def test_the_page_tells_the_ladder(repository: Repository) -> None:
    page = (repository.folder / "artifacts/report/report.html").read_text()
    for word in ("finetune", "distill", "prune", "quantize", "cascade", "absent"):
        assert word in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_missing_gpu_is_said_to_be_missing(repository: Repository) -> None:
    metrics = repository.metrics("deploy_check")
    assert metrics["gpu"] in ("absent", "present")
    if metrics["gpu"] == "absent":
        assert metrics["devices"].get("gpu", {}).get("verdict") != "passed"


def test_runs_are_tracked(repository: Repository) -> None:
    from stages.core.observe.tracking import open_client

    client = open_client(f"sqlite:///{repository.folder}/artifacts/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("headroom-tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[-1].info.run_id]
    names = {run.data.tags["headroom.stage"] for run in children}
    assert set(STAGES) - names <= {"fingerprint"}
    finetune = next(run for run in children if run.data.tags["headroom.stage"] == "finetune")
    assert finetune.data.tags["headroom.output"] == digest(repository.folder / "artifacts/finetune")
    assert len(client.get_metric_history(finetune.info.run_id, "validation_loss")) >= 2
    version = client.get_model_version_by_alias("headroom-tiny", repository.metrics("register")["alias"])
    assert str(version.version) == str(repository.metrics("register")["version"])


def test_a_second_run_executes_nothing(repository: Repository) -> None:
    before = (repository.folder / "dvc.lock").read_text()
    summary = json.loads(repository.run("run", "--json").stdout)
    again = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert {name for name, status in again.items() if status != "cached"} <= {"fingerprint"}
    assert (repository.folder / "dvc.lock").read_text() == before
    repro = repository.call(["dvc", "repro"])
    assert [line for line in repro.stdout.splitlines() if line.startswith("Running stage")] == [
        "Running stage 'fingerprint':"
    ]


def test_the_same_params_and_input_give_the_same_bits(repository: Repository, tmp_path: Path) -> None:
    before = {name: digest(repository.folder / "artifacts" / name / "model") for name in VARIANTS}
    for name in VARIANTS:
        repository.call(["dvc", "repro", "--single-item", "--force", "--no-run-cache", name])
    assert {name: digest(repository.folder / "artifacts" / name / "model") for name in VARIANTS} == before


def test_dvc_shows_metrics_and_plots_and_pushes(repository: Repository) -> None:
    shown = json.loads(repository.call(["dvc", "metrics", "show", "--json"]).stdout)
    assert "artifacts/evaluate/quantize/metrics.json" in shown[""]["data"]
    repository.call(["dvc", "plots", "show", "-o", "plots"])
    assert (repository.folder / "plots/index.html").exists()
    repository.call(["dvc", "push", "-q", "export@quantize"])
    shutil.rmtree(repository.folder / "artifacts/export/quantize")
    shutil.rmtree(repository.folder / ".dvc/cache")
    repository.call(["dvc", "pull", "-q", "export@quantize"])
    verify(repository.folder / "artifacts/export/quantize/model")


def test_predict_keeps_rows_and_order(repository: Repository, tmp_path: Path) -> None:
    texts = ["What is a cat ?", "", "Who was the first president ?", 'odd, "quoted" text\u2028here', "   "]
    source, target = tmp_path / "questions.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))
    repository.run("predict", "artifacts/export/quantize", str(source), "-o", str(target))
    with target.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["text"] for row in rows] == texts
    assert [row["id"] for row in rows] == list("01234")
    assert all(row["label"] and 0 < float(row["score"]) <= 1 for row in rows)


def test_an_altered_model_is_named(repository: Repository, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(repository.folder / "artifacts/export/quantize/model", folder)
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    done = repository.run("predict", str(folder), "-", "-o", "-", check=False, text="hello\n")
    assert done.returncode == 2
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_params_are_refused_before_any_work(repository: Repository) -> None:
    path = repository.folder / "params.yaml"
    good = path.read_text()
    path.write_text(good.replace("epochs:", "epoch:").replace("seed:", "sed:"))
    try:
        for command in (["run"], ["plan"]):
            done = repository.run(*command, check=False)
            assert done.returncode == 2
            assert "did you mean epochs?" in done.stderr
            assert "did you mean seed?" in done.stderr
            assert "Traceback" not in done.stderr
    finally:
        path.write_text(good)

"""The console script as a user types it."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.presets import BACKUP, use_preset
from flows.schedule import check_schedule
from stages.core.errors import UserError

VERBS = ["run", "plan", "schedule", "predict", "report", "use"]


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_help_is_quick_and_teaches(project) -> None:
    project.headroom("--help")  # the first call may have to write byte code
    started = time.monotonic()
    done = project.headroom("--help")
    assert time.monotonic() - started < 2.0  # well under a second on a quiet machine
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.output and f"headroom {verb}" in done.output


def test_help_loads_none_of_the_big_libraries() -> None:
    code = (
        "import sys, flows.cli; print([n for n in ('prefect', 'dvc', 'mlflow', 'torch', 'pandas') if n in sys.modules])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "verb", [["run"], ["plan"], ["report"], ["use", "questions"], ["schedule", "--interval", "60"]]
)
def test_outside_a_project_every_verb_says_so_in_one_line(verb, tmp_path: Path, project) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    project.folder = elsewhere
    done = project.headroom(*verb)
    assert done.returncode == 2
    assert len(lines(done.stderr)) == 1
    assert "run in the folder of a Headroom project" in done.stderr


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_mistakes_in_params_are_listed_before_anything_starts(verb: str, project) -> None:
    text = Path("params.yaml").read_text().replace("seed: 17", "sede: 17").replace("opset: 21", "opset: x")
    Path("params.yaml").write_text(text)
    done = project.headroom(verb)
    assert done.returncode == 2
    assert len(lines(done.stderr)) == 3
    assert "sede: unknown name; did you mean seed?" in done.stderr
    assert project.trace() == []


def test_plan_speaks_json(built) -> None:
    Path("input.txt").write_text("other")
    done = built.headroom("plan", "--json")
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    assert {stage["stage"]: stage["outlook"] for stage in plan["stages"]}["acquire"] == "run"
    text = built.headroom("plan")
    assert "input.txt is modified" in text.stdout and "6 stages to run: about 9 s" in text.stdout


def test_run_from_the_shell_with_a_server_of_its_own(built, empty_database: Path) -> None:
    (built.folder / "artifacts/mlflow").mkdir()
    shutil.copy(empty_database, built.folder / "artifacts/mlflow/mlflow.db")
    first = built.headroom("run", "--json")
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert [stage["status"] for stage in summary["stages"]] == ["ran"] + ["cached"] * 6
    started = time.monotonic()
    second = built.headroom("run")
    print(f"nothing changed: {time.monotonic() - started:.1f} s")
    assert second.returncode == 0
    assert "cached" in second.stdout and "Traceback" not in second.stderr
    assert (built.folder / "artifacts/.prefect").is_dir()
    assert built.started() == []


def test_ctrl_c_reaches_the_stages_and_ends_with_130(built) -> None:
    """As on a terminal: the signal goes to every process of the group."""
    Path("input.txt").write_text("other")
    built.behave("acquire", "sleep 60")
    process = built.start("run")
    deadline = time.monotonic() + 120
    while not built.trace() or ("acquire", "start") not in built.trace():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - started < 30
    assert (built.folder / "saved-acquire").exists()
    assert "Traceback" not in errors
    assert errors.count("stopping") == 1


def test_a_verb_that_does_not_exist_and_a_stage_that_does_not(project) -> None:
    assert project.headroom("rnu").returncode == 2
    done = project.headroom("run", "--stage", "prun")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert "has no stage 'prun'; the stages are:" in done.stderr


def test_a_server_that_does_not_answer_is_named(built) -> None:
    done = built.headroom("run", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "no Prefect server answers at http://127.0.0.1:9/api" in done.stderr


@pytest.mark.parametrize(
    ("cron", "interval", "message"),
    [
        (None, None, "give either --cron"),
        ("0 2 * * *", 3600, "give either --cron"),
        ("0 2 * *", None, "is no cron expression; give five fields"),
        ("61 2 * * *", None, "is no cron expression"),
        (None, 5, "shorter than a minute"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(cron: str | None, interval: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_schedule(cron, interval)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cron", "interval"), [("0 2 * * *", None), ("@daily", None), (None, 3600)])
def test_schedules_that_make_sense_are_taken(cron: str | None, interval: int | None) -> None:
    check_schedule(cron, interval)


def test_a_schedule_needs_a_server_that_stays(project) -> None:
    done = project.headroom("schedule", "--cron", "0 2 * * *")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert "start one with `make ui`, then `export PREFECT_API_URL=" in done.stderr


def test_report_without_a_run_and_with_one(built, evaluations) -> None:
    missing = built.headroom("report")
    assert (missing.returncode, len(lines(missing.stderr))) == (2, 1)
    assert "no report yet; `headroom run` makes it" in missing.stderr

    evaluations(built.folder)
    (built.folder / "artifacts/report/report.html").write_text("<p>ladder")
    Path("input.txt").write_text("other")
    shown = built.headroom("report")
    assert shown.returncode == 0
    assert "7.2" in shown.stdout and lines(shown.stdout)[-1] == "artifacts/report/report.html"
    assert "stages changed since" in shown.stderr
    ladder = json.loads(built.headroom("report", "--json").stdout)
    assert [row["name"] for row in ladder] == ["naive PyTorch", "fair PyTorch", "finetune", "quantize"]


def test_report_alone_out_of_date_is_built_again(built) -> None:
    text = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(text.replace("artifacts/report artifacts", "artifacts/report  artifacts"))
    built.headroom("report")
    assert built.started() == ["report"]


@pytest.fixture
def evaluations():
    """Write the metrics of two variants, as far as the ladder reads them."""

    def write(folder: Path) -> None:
        for name, gain in (("finetune", 2.0), ("quantize", 7.2)):
            spread = {"median": gain, "low": gain, "high": gain}
            milliseconds = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
            baseline = {"texts_per_second": 100.0, "latency_ms": milliseconds}
            metrics = {
                "quality": {"accuracy": 0.96},
                "against_reference": {
                    **{"metric": "accuracy", "difference": -0.001, "low": -0.004, "high": 0.002},
                    **{"confidence": 0.95, "detectable_difference": 0.02, "within_floor": True},
                },
                "size": {"parameters": 1000, "model_bytes": 4000},
                "best": {
                    **{"latency_runtime": "openvino-cpu", "latency_ms": milliseconds, "batch_size": 32},
                    **{"throughput_runtime": "openvino-cpu", "texts_per_second": 720.0, "peak_memory_mb": 100.0},
                },
                "baselines": {"fair": baseline, "naive": baseline},
                "speedup": {
                    f"{what}_over_{whom}": spread for what in ("throughput", "latency") for whom in ("fair", "naive")
                },
            }
            path = folder / "artifacts" / "evaluate" / name / "metrics.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(metrics))

    return write


@pytest.fixture
def presets(project) -> Path:
    text = Path("presets/questions.yaml").read_text()
    Path("presets/spam.yaml").write_text(text.replace("seed: 17", "seed: 18  # for spam"))
    return Path("params.yaml")


def test_use_writes_the_preset_to_the_letter(presets: Path) -> None:
    assert use_preset("spam", force=False) is None
    assert presets.read_text() == Path("presets/spam.yaml").read_text()
    assert "# for spam" in presets.read_text()
    assert not BACKUP.exists()
    assert use_preset("spam", force=False) is None


def test_use_keeps_edits_unless_forced_and_then_backs_them_up(presets: Path) -> None:
    edited = presets.read_text().replace("opset: 21", "opset: 22")
    presets.write_text(edited)
    with pytest.raises(UserError, match="has edits that are in no preset"):
        use_preset("spam", force=False)
    assert presets.read_text() == edited
    assert use_preset("spam", force=True) == BACKUP
    assert BACKUP.read_text() == edited


def test_use_backs_up_comments_of_ones_own(presets: Path) -> None:
    presets.write_text(presets.read_text() + "# remember: ask Ada\n")
    assert use_preset("spam", force=False) == BACKUP
    assert "Ada" in BACKUP.read_text()


def test_use_names_the_presets_and_the_nearest(presets: Path, project) -> None:
    done = project.headroom("use", "spma")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert "did you mean spam? the presets are: questions, spam" in done.stderr


def test_use_refuses_a_preset_that_is_not_valid(presets: Path) -> None:
    Path("presets/spam.yaml").write_text("seed: 1\n")
    before = presets.read_text()
    with pytest.raises(UserError, match=r"presets/spam\.yaml: task: missing"):
        use_preset("spam", force=False)
    assert presets.read_text() == before


def test_use_writes_params_where_there_are_none(presets: Path, project) -> None:
    presets.unlink()
    done = project.headroom("use", "questions", "--json")
    assert json.loads(done.stdout) == {"preset": "questions", "backup": None}
    assert presets.exists()

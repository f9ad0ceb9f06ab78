"""The real graph: what `dvc.yaml` declares is what the code does, and what the README says."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.declarations import declaration_problems, module_of, sections_read, shared_code, table_in_readme
from flows.graph import Stage, read_graph, stage_table
from stages.core.ladder import PARENTS, VARIANTS

ROOT = Path(__file__).parents[1]
ROOMS = [
    *["acquire", "clean", "tokenize", "pretrain", "finetune", "distill", "latency_table", "prune", "quantize"],
    *["export", "cascade", "evaluate", "robustness", "explain", "deploy_check", "review", "report"],
]
SERVED_AS_WELL = {"quantize_finetuned": "quantize"}
"""Stages whose room is named after another stage."""


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def stages() -> list[Stage]:
    return list(read_graph().stages)


def test_stages_are_the_rooms_in_order() -> None:
    names = list(dict.fromkeys(stage.name.split("@")[0] for stage in stages()))
    assert [name for name in names if name not in SERVED_AS_WELL] == [
        *("fingerprint", *ROOMS[:-1], "history", "report", "register")
    ]
    assert set(SERVED_AS_WELL) <= set(names)
    assert sorted(path.parent.name for path in Path("stages").glob("*/__main__.py")) == sorted(ROOMS)
    assert {module_of(stage) for stage in stages()} == {
        *(f"stages.{room}" for room in ROOMS), "stages.core.fingerprint", "flows.history", "flows.registry",
    }  # fmt: skip


def test_dependencies_and_params_are_those_of_the_code() -> None:
    assert declaration_problems() == []


def test_declarations_notice_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, code in {
        "stages/core/one.py": "from stages.core import two\nimport stages.core.observe.watch\n",
        "stages/core/two.py": "def seed(params): return params.quality.floor\n",
        "stages/core/observe/watch.py": "",
        "stages/room/__main__.py": "def main():\n    from stages.core import one\n    return run.params.prune.rounds\n",
        "stages/room/page.html": "{{ params.evaluate.confidence }}",
        "stages/other/__main__.py": "if TYPE_CHECKING:\n    from stages.core.one import a\n",
    }.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(code)
    assert shared_code("stages.room") == {"stages/core/one.py", "stages/core/two.py"}
    assert shared_code("stages.other") == set()
    assert sections_read("stages.room") == {"prune", "quality", "evaluate"}


def test_every_output_is_a_folder_of_its_stage_and_read_paths_are_declared() -> None:
    outputs = [output for stage in stages() for output in stage.outputs]
    assert len(outputs) == len(set(outputs))
    for stage in stages():
        words = [word for word in stage.command.split() if word.startswith("artifacts/")]
        written = Path(words[-1])
        assert all(Path(output) == written or Path(output).parent == written for output in stage.outputs), stage.name
        assert set(words[:-1]) == {path for path in stage.dependencies if path.startswith("artifacts/")} - {
            "artifacts/fingerprint/hardware.json", "artifacts/fingerprint/sources.json",
            "artifacts/fingerprint/corrections.json", "artifacts/fingerprint/checkpoints.json",
            "artifacts/fingerprint/arithmetic.json",
        }, stage.name  # fmt: skip


def test_the_parent_of_a_model_is_that_of_the_ladder() -> None:
    evaluated = yaml.safe_load(Path("dvc.yaml").read_text())["vars"][1]["evaluated"]
    assert tuple(evaluated) == VARIANTS
    for variant, folders in evaluated.items():
        parent = PARENTS.get(variant)
        assert folders["parent"] == (evaluated[parent]["model"] if parent else "artifacts/finetune/model")


def test_what_measures_has_the_machine_to_itself_and_depends_on_it() -> None:
    measuring = {stage.name.split("@")[0] for stage in stages() if stage.measures}
    assert measuring == {"latency_table", "prune", "evaluate", "deploy_check"}
    # The table names the machine's times where pruning asks for any, and stays the same on every machine where not.
    machine = {"artifacts/fingerprint/hardware.json", "artifacts/latency_table/table"}
    for stage in stages():
        assert stage.measures == bool(machine & set(stage.dependencies)), stage.name


def test_what_trains_depends_on_the_precision_that_auto_takes() -> None:
    for stage in stages():
        trains = "stages/core/training/loop.py" in stage.dependencies
        assert trains == ("artifacts/fingerprint/arithmetic.json" in stage.dependencies), stage.name


def test_the_readme_has_the_table_of_the_graph() -> None:
    assert table_in_readme() == stage_table()


def test_metrics_are_outputs_of_stages() -> None:
    outputs = {output for stage in stages() for output in stage.outputs}
    for metric in yaml.safe_load(Path("dvc.yaml").read_text())["metrics"]:
        assert str(Path(metric).parent) in outputs


def test_layers_are_kept() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-logo"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_byte_code_is_not_a_dependency() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repository:
        ignored = repository.dvcignore
        assert ignored.is_ignored_dir(str(ROOT / "stages" / "prune" / "__pycache__"))
        assert not ignored.is_ignored_dir(str(ROOT / "stages" / "prune"))

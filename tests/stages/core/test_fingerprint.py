from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core import fingerprint
from stages.core.artifacts import file_sha256, read_json
from stages.core.hardware import saturates_here, training_precision_here

PROJECT = Path(__file__).parents[3]
OUT = Path("artifacts/fingerprint")
FILES = ("hardware.json", "arithmetic.json", "sources.json", "corrections.json", "checkpoints.json")


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    params: dict[str, Any] = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["acquire"]["data"]["source"] = {"kind": "local", "path": "mine"}
    params["acquire"]["checkpoint"] = {"kind": "local", "path": "nowhere"}
    (tmp_path / "mine/more").mkdir(parents=True)
    (tmp_path / "mine/train.csv").write_text("text,label\na,b\n")
    (tmp_path / "mine/more/test.csv").write_text("text,label\n")
    return params


def run(params: dict[str, Any]) -> int:
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return fingerprint.main(["--out", str(OUT)])


def test_local_files_are_summed_and_missing_ones_told(raw: dict[str, Any]) -> None:
    assert run(raw) == 0
    assert read_json(OUT / "sources.json") == {
        "acquire.data.source": {
            "path": "mine",
            "files": {
                "more/test.csv": file_sha256(Path("mine/more/test.csv")),
                "train.csv": file_sha256(Path("mine/train.csv")),
            },
        },
        "acquire.checkpoint": {"path": "nowhere", "missing": True},
    }
    assert read_json(OUT / "hardware.json")["cpu"]["model"]


def test_the_arithmetic_that_decides_results_is_told(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(raw) == 0
    told = read_json(OUT / "arithmetic.json")
    assert told == {"int8_saturates": saturates_here(), "training_precision": training_precision_here()}
    monkeypatch.setattr(fingerprint, "training_precision_here", lambda: "fp16")
    assert run(raw) == 0
    assert read_json(OUT / "arithmetic.json") == {**told, "training_precision": "fp16"}


def test_sources_inside_lists_are_found(raw: dict[str, Any]) -> None:
    raw["acquire"]["corpus"][1]["source"] = {"kind": "local", "path": "mine/train.csv"}
    assert run(raw) == 0
    entry = read_json(OUT / "sources.json")["acquire.corpus.1.source"]
    assert entry == {"path": "mine/train.csv", "files": {"train.csv": file_sha256(Path("mine/train.csv"))}}


def test_checkpoints_that_distillation_names_are_summed_apart_from_the_sources(raw: dict[str, Any]) -> None:
    assert run(raw) == 0
    assert read_json(OUT / "checkpoints.json") == {}
    sources = (OUT / "sources.json").read_bytes()
    raw["distill"]["teachers"] = ["mine/more", "nowhere"]
    raw["distill"]["student"] = {"kind": "checkpoint", "path": "mine/more"}
    assert run(raw) == 0
    entry = {"path": "mine/more", "files": {"test.csv": file_sha256(Path("mine/more/test.csv"))}}
    assert read_json(OUT / "checkpoints.json") == {
        "distill.teachers[0]": entry,
        "distill.teachers[1]": {"path": "nowhere", "missing": True},
        "distill.student": entry,
    }
    assert (OUT / "sources.json").read_bytes() == sources
    Path("mine/more/test.csv").write_text("text,label\nc,d\n")
    assert run(raw) == 0
    assert read_json(OUT / "checkpoints.json")["distill.student"] != entry


def test_corrections_are_summed_apart_so_that_only_cleaning_reruns(raw: dict[str, Any]) -> None:
    assert run(raw) == 0
    assert read_json(OUT / "corrections.json") == {}
    sources = (OUT / "sources.json").read_bytes()
    raw["clean"]["corrections"] = "corrected.csv"
    Path("corrected.csv").write_text("key,correction\n")
    assert run(raw) == 0
    before = read_json(OUT / "corrections.json")
    assert before["clean.corrections"]["files"] == {"corrected.csv": file_sha256(Path("corrected.csv"))}
    Path("corrected.csv").write_text("key,correction\n1,x\n")
    assert run(raw) == 0
    assert read_json(OUT / "corrections.json") != before
    assert (OUT / "sources.json").read_bytes() == sources


def test_an_unchanged_machine_leaves_the_files_alone(raw: dict[str, Any]) -> None:
    assert run(raw) == 0
    before = [(OUT / name).stat().st_mtime_ns for name in FILES]
    assert run(raw) == 0
    assert before == [(OUT / name).stat().st_mtime_ns for name in FILES]


def test_a_change_of_the_same_size_is_seen(raw: dict[str, Any]) -> None:
    run(raw)
    time.sleep(0.01)
    Path("mine/train.csv").write_text("text,label\na,c\n")
    run(raw)
    files = read_json(OUT / "sources.json")["acquire.data.source"]["files"]
    assert files["train.csv"] == file_sha256(Path("mine/train.csv"))


def test_known_files_are_not_read_again(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(raw)
    read: list[Path] = []
    monkeypatch.setattr(fingerprint, "file_sha256", lambda path: read.append(path) or "0" * 64)
    Path("mine/more/new.csv").write_text("text,label\n")
    run(raw)
    assert [path.name for path in read] == ["new.csv"]


def test_a_damaged_cache_only_costs_time(raw: dict[str, Any]) -> None:
    run(raw)
    fingerprint._SUMS.write_text("{")
    assert run(raw) == 0


def test_bad_params_are_told_line_by_line(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    raw["sed"] = raw.pop("seed")
    raw["finetune"]["epochs"] = "many"
    assert run(raw) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert all(line.startswith("fingerprint: params.yaml: ") for line in lines)
    assert any("sed: unknown name; did you mean seed?" in line for line in lines)
    assert any("finetune.epochs" in line for line in lines)
    assert not OUT.exists()


def test_starts_without_the_heavy_packages(raw: dict[str, Any]) -> None:
    run(raw)
    program = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from stages.core.fingerprint import main\n"
        f"main(['--out', {str(OUT)!r}])\n"
        "print([name for name in ('torch', 'pandas', 'numpy', 'transformers', 'mlflow') if name in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 5  # 0.25 s where it was written; other tests may keep the machine busy

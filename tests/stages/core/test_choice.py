from pathlib import Path

import pytest

from stages.core.artifacts import read_json, write_json
from stages.core.choice import DEFAULT, Setting, read_choice, write_choice
from stages.core.errors import UserError

LATENCY = Setting("onnxruntime-cpu", threads=1, streams=1, precision=None, batch_tokens=10)
THROUGHPUT = Setting("openvino-cpu", threads=2, streams=2, precision="f32", batch_tokens=512)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "runtime.json"
    write_choice(path, {"latency": LATENCY, "throughput": THROUGHPUT}, {"texts_per_second": 5.0})
    return path


def test_a_choice_is_read_back_for_each_goal(path: Path) -> None:
    assert read_choice(path, "latency") == (LATENCY, None)
    assert read_choice(path, "throughput") == (THROUGHPUT, None)
    assert read_json(path)["measured"] == {"texts_per_second": 5.0}


def test_another_machine_or_a_missing_runtime_is_told(path: Path) -> None:
    content = read_json(path)
    write_json(path, {**content, "throughput": {**content["throughput"], "runtime": "onnxruntime-none"}})
    setting, problem = read_choice(path, "throughput")
    assert setting == DEFAULT
    assert "onnxruntime-none was the fastest but is not installed here" in str(problem)
    write_json(path, {**content, "fingerprint": "other"})
    setting, problem = read_choice(path, "throughput")
    assert setting == DEFAULT
    assert "measured on another machine" in str(problem)


def test_another_file_is_refused(path: Path) -> None:
    write_json(path, {"format": 99})
    with pytest.raises(UserError, match=r"runtime\.json: is not a runtime choice of format 2"):
        read_choice(path, "latency")

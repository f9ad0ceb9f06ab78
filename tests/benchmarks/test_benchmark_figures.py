"""The pure parts of the benchmark: ratios, the table, the page, batching and counting. Never a speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import psutil
import pytest

from benchmarks.contenders import (
    NAIVE,
    PEERS,
    REFERENCE,
    Contender,
    choose,
    compressing_minutes,
    headroom_contenders,
)
from benchmarks.environments import PEERS as PEER_FOLDERS
from benchmarks.environments import last_complaint, pins
from benchmarks.page import difference, render_page, render_section, table_line
from benchmarks.peers.service import Answering, pad
from benchmarks.picture import draw
from benchmarks.summary import Row, fastest, make_rows, soonest, victories
from benchmarks.workers import Worker, WorkerError, run_once
from stages.core.errors import UserError

REFERENCE_CONTENDER = PEERS[0]
SMALL = Contender("headroom-small", "Headroom, small", "", "export/small")
BROKEN = Contender("broken", "Broken", "olive", "int8")


def result(predictions: list[int] | None, speeds: list[float], latencies: list[float]) -> dict[str, object]:
    return {
        "predictions": predictions,
        "texts_per_second": speeds,
        "latency_ms": latencies,
        "batch_size": 32,
        "model_bytes": 3 * 2**20,
        "peak_memory_mb": 250.4,
        "compress_minutes": 1.5,
    }


LABELS = [0, 1] * 50
MEASURED = {
    REFERENCE: result(LABELS, [100.0, 200.0, 110.0], [4.0] * 6),
    SMALL.name: result([1, *LABELS[1:]], [1000.0, 1000.0, 2200.0], [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
    BROKEN.name: {"error": "no | such\nthing"},
}


@pytest.fixture
def rows() -> list[Row]:
    return make_rows([REFERENCE_CONTENDER, SMALL, BROKEN], MEASURED, LABELS, "accuracy", seed=0)


def test_a_row_holds_medians_percentiles_and_the_paired_difference(rows: list[Row]) -> None:
    small = rows[1]
    assert small.texts_per_second == 1000.0
    assert small.p50 == 2.0
    assert small.p99 == pytest.approx(4.0)
    assert small.latency == (1.0, 2.0, 4.0)
    assert small.quality == pytest.approx(0.99)
    assert small.difference == pytest.approx(-0.01)
    assert small.low <= -0.01 <= small.high <= 0.0


def test_the_reference_differs_from_itself_by_nothing(rows: list[Row]) -> None:
    assert (rows[0].difference, rows[0].low, rows[0].high) == (0.0, 0.0, 0.0)


def test_ratios_are_taken_round_by_round(rows: list[Row]) -> None:
    throughput = next(win for win in victories(rows, floor=0.02) if win.what == "throughput")
    assert (throughput.median, throughput.low, throughput.high) == (10.0, 5.0, 20.0)
    latency = next(win for win in victories(rows, floor=0.02) if win.what.startswith("latency"))
    assert (latency.median, latency.low, latency.high) == (2.0, 1.0, 4.0)


def test_who_loses_more_than_the_floor_cannot_win(rows: list[Row]) -> None:
    assert fastest(rows, floor=0.005, headroom=True) is None
    assert soonest(rows, floor=0.005, headroom=True) is None
    assert [win for win in victories(rows, floor=0.005) if win.winner == SMALL.title] == []


def test_a_baseline_that_answers_some_texts_has_the_quality_of_the_model_it_runs() -> None:
    naive = next(contender for contender in PEERS if contender.name == NAIVE)
    measured = {**MEASURED, NAIVE: result(None, [10.0, 10.0, 10.0], [90.0, 90.0, 90.0])}
    row = make_rows([naive], measured, LABELS, "accuracy", seed=0)[0]
    assert (row.quality, row.difference) == (1.0, 0.0)


def test_a_failed_peer_keeps_its_line_with_the_reason(rows: list[Row]) -> None:
    line = table_line(rows[2], rows[0])
    assert "failed: no / such thing" in line
    assert line.count("|") == table_line(rows[0], rows[0]).count("|")


def test_a_line_of_the_table(rows: list[Row]) -> None:
    assert table_line(rows[0], rows[0]) == (
        "| PyTorch fp32, longest in batch | 100.0 % |  | 4.00 | 4.00 | 110 (100 to 200) | 1.00 | 3.0 | 250 | 1.5 | 32 |"
    )
    assert table_line(rows[1], rows[0]).startswith("| **Headroom, small** | 99.0 % | −1.0 (")
    assert difference(rows[0]) == "0.0 (0.0 to 0.0)"


def test_the_page_has_a_section_a_task_and_says_who_failed(rows: list[Row]) -> None:
    facts = {
        "command": "python -m benchmarks",
        "date": "2026-11-22",
        "metric": "accuracy",
        "floor": 0.02,
        "rounds": 3,
        "texts": 100,
        "test_texts": 100,
        "tokens": 13.3,
        "other_load": 0.014,
        "minutes": 12.4,
        "threads": {"OMP_NUM_THREADS": "1"},
        "hardware": {
            "cpu": {"model": "A processor", "logical_cores": 2, "features": ["avx2"]},
            "memory_gib": 23.5,
            "system": {"os": "Linux", "python": "3.11"},
        },
        "versions": {"optimum": {"onnx": "1"}},
        "ceilings": {"fp32": 31.4, "bf16": 130.0, "int8": 205.0, "bandwidth": 10.7},
        "used": {"title": "Headroom, small", "operations": 2e8, "rate": 1e11, "precision": "int8", "share": 0.5},
    }
    section = render_section(rows, victories(rows, 0.02), rows[0], facts)
    assert "1 of 3 contenders could not take part" in section
    assert "| throughput | Headroom, small | PyTorch fp32, longest in batch | 10.00 (5.00 to 20.00) |" in section
    assert "50 % of the int8 ceiling" in section
    assert "OMP_NUM_THREADS=1" in section
    assert "All of it took 12 minutes. Other processes used 1 % of the processors" in section
    page = render_page({"questions": section, "reviews": section})
    assert page.index("## questions") < page.index("## reviews")


def test_every_peer_has_pinned_requirements_with_the_same_torch() -> None:
    for peer in {contender.peer for contender in PEERS}:
        found = pins(peer)
        assert found["torch"] == "2.13.0"
        text = "".join(path.read_text() for path in (PEER_FOLDERS / peer).glob("*.txt"))
        assert "torch==2.13.0\n" in text
        assert "://" not in text


def test_names_are_unique_and_shared_models_exist() -> None:
    names = [contender.name for contender in PEERS]
    assert len(set(names)) == len(names)
    assert all(contender.made_by in names[: names.index(contender.name)] for contender in PEERS if contender.made_by)


def test_only_keeps_the_reference_and_refuses_an_unknown_name() -> None:
    assert [each.name for each in choose(PEERS, ["nncf"])] == [REFERENCE, "nncf-int8"]
    assert choose(PEERS, []) == list(PEERS)
    with pytest.raises(UserError, match="no such contender"):
        choose(PEERS, ["apache"])


def test_only_takes_what_a_shared_model_comes_from() -> None:
    names = [each.name for each in choose(PEERS, ["openvino-bf16"])]
    assert names == [REFERENCE, "openvino-fp32", "openvino-bf16"]


def test_headroom_takes_part_with_every_export_and_the_cascade(tmp_path: Path) -> None:
    for folder, name in (("export/quantize", "headroom"), ("export/prune", "headroom"), ("cascade", "cascade")):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / f"{name}.json").write_text("{}")
    found = headroom_contenders(tmp_path)
    assert [each.variant for each in found] == ["export/prune", "export/quantize", "cascade"]
    assert all(each.headroom for each in found)


def test_compressing_minutes_add_up_the_stages_after_finetune(tmp_path: Path) -> None:
    seconds = {"pretrain": 1000, "finetune": 1000, "distill": 60, "quantize": 30, "export/quantize": 30}
    for stage, spent in seconds.items():
        (tmp_path / stage).mkdir(parents=True)
        (tmp_path / stage / "measured.json").write_text(json.dumps({"wall_seconds": spent}))
    model = tmp_path / "export" / "quantize" / "model"
    model.mkdir()
    lineage = [{"stage": name} for name in ("pretrain", "finetune", "distill", "quantize", "export@quantize")]
    (model / "headroom.json").write_text(json.dumps({"lineage": lineage}))
    contender = Contender("headroom-quantize", "", "", "export/quantize")
    assert compressing_minutes(tmp_path, contender) == 2.0
    (tmp_path / "distill" / "measured.json").unlink()
    assert compressing_minutes(tmp_path, contender) is None


def test_the_reason_is_the_last_line_that_names_an_error() -> None:
    assert last_complaint("start\nValueError: bad\nretrying\nclean up\n") == "ValueError: bad"
    assert last_complaint("killed\n\n") == "killed"
    assert last_complaint("") == "no output"


def test_padding_and_the_order_of_the_answers() -> None:
    ids, mask = pad([[5], [6, 7]], pad_id=9, length=None)
    assert ids.tolist() == [[5, 9], [6, 7]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    assert pad([[5]], 9, 4)[0].shape == (1, 4)


class _Words:
    """A tokenizer that gives each text as many tokens as it has words, all equal to its first digit."""

    def encode_batch_fast(self, texts: list[str]) -> list[object]:
        return [type("Encoding", (), {"ids": [int(text[0])] * len(text.split())}) for text in texts]


class _FirstToken:
    """A model whose label is the first token; it notes the lengths it was given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def logits_many(self, batches: list[tuple[numpy.ndarray, numpy.ndarray]]) -> list[numpy.ndarray]:
        self.lengths = [ids.shape[1] for ids, _ in batches]
        return [numpy.eye(10)[ids[:, 0]] for ids, _ in batches]


def test_texts_are_sorted_by_length_and_answers_come_in_their_order() -> None:
    texts = ["1 a b c", "2", "3 a b", "4 a"]
    model = _FirstToken()
    assert Answering(model, _Words(), 0).classify(texts, 2) == [1, 2, 3, 4]
    assert model.lengths == [2, 4]
    assert Answering(model, _Words(), 0, by_length=False).classify(texts, 2) == [1, 2, 3, 4]
    assert model.lengths == [4, 3]


def test_the_picture_holds_every_contender_that_ran(rows: list[Row], tmp_path: Path) -> None:
    draw({"questions": rows, "reviews": rows[:2]}, 0.01, tmp_path / "docs" / "benchmarks.png")
    assert (tmp_path / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_answers_stops_between_turns_and_tells_why_it_died(tmp_path: Path) -> None:
    package = tmp_path / "answers.py"
    package.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    if json.loads(line)['do'] == 'die':\n"
        "        raise ValueError('no more')\n"
        "    print(json.dumps({'asked': json.loads(line)['do'], 'given': sys.argv[1]}), flush=True)\n"
    )
    with Worker(Path(sys.executable), "answers", {"a": 1}, tmp_path / "log", folder=tmp_path) as worker:
        assert worker.ask({"do": "this"}) == {"asked": "this", "given": '{"a": 1}'}
        assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
        assert worker.ask({"do": "that"})["asked"] == "that"
        with pytest.raises(WorkerError, match="ValueError: no more"):
            worker.ask({"do": "die"})


def test_a_process_that_fails_gives_its_reason(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"No module named '?no_such_module"):
        run_once(Path(sys.executable), "no_such_module", {}, seconds=60)

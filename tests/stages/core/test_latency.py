from pathlib import Path

import numpy
import pytest

from stages.core.examples import Examples
from stages.core.latency import (
    Deployment,
    LatencyTable,
    read_table,
    seconds_a_text,
    without_noise,
    workload,
    write_table,
)
from stages.core.structure import LayerWidth

TABLE = LatencyTable(
    "openvino-cpu",
    Deployment(True, True, 21),
    rest=5.0,
    shell=1.0,
    heads={2: 4.0, 4: 10.0},
    neurons={16: 2.0, 32: 8.0},
    last=0.5,
)


def test_times_between_measured_widths_lie_on_a_line_and_nothing_costs_nothing() -> None:
    assert [TABLE.attention_seconds(heads) for heads in range(5)] == [0.0, 2.0, 4.0, 7.0, 10.0]
    assert TABLE.feed_forward_seconds(24) == 5.0
    assert TABLE.feed_forward_seconds(0) == 0.0


def test_a_model_takes_the_sum_of_its_parts() -> None:
    widths = [LayerWidth(4, 32), LayerWidth(0, 16)]
    assert TABLE.model_seconds(widths) == 5.0 + 2 * 1.0 + 10.0 + 8.0 + 0.5 * 2.0
    assert TABLE.largest_speedup(widths) == 26.0 / 7.0


@pytest.mark.parametrize("table", [TABLE, None])
def test_a_table_survives_the_disk(table: LatencyTable | None, tmp_path: Path) -> None:
    write_table(table, tmp_path)
    assert read_table(tmp_path) == table


def test_noise_is_averaged_so_that_more_never_costs_less() -> None:
    noisy = LatencyTable(
        "openvino-cpu", Deployment(False, False, 21), 1.0, 0.0, {1: 3.0, 2: 2.0, 3: 5.0}, {8: -1.0, 16: 1.0}, 1.0
    )
    calm = without_noise(noisy)
    assert calm.heads == {1: 2.5, 2: 2.5, 3: 5.0}
    assert calm.neurons == {8: 0.0, 16: 1.0}


def test_slow_rounds_do_not_count() -> None:
    assert seconds_a_text([100.0, 100.0, 100.0, 3.0, 1.0]) == pytest.approx(0.01)


def test_the_workload_is_real_texts_alone_or_in_batches_of_like_length() -> None:
    rows = [[7] * (1 + number % 50) for number in range(400)]
    examples = Examples([""] * 400, rows, numpy.zeros(400, dtype=numpy.int64))
    single = workload(examples, "latency", 0, 1)
    assert {len(ids) for ids, _ in single} == {1}
    assert all(mask.all() for _, mask in single)
    batches = workload(examples, "throughput", 0, 1)
    assert [len(ids) for ids, _ in batches] == [32] * 8
    lengths = [ids.shape[1] for ids, _ in batches]
    assert lengths == sorted(lengths)

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.timing import (
    durations,
    interleave,
    interleave_latency,
    percentiles,
    ratios,
    uncollected,
    watch_other_load,
)

Numbers = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=20)


def note(log: list[str], name: str, items: int, seconds: float = 0.0) -> Callable[[], int]:
    def work() -> int:
        log.append(name)
        time.sleep(seconds)
        return items

    return work


def test_contenders_take_turns_in_changing_order() -> None:
    log: list[str] = []
    names = ["a", "b", "c"]
    result = interleave({name: note(log, name, 1) for name in names}, rounds=6, seed=3)
    rounds = [log[start : start + 3] for start in range(0, len(log), 3)]
    assert len(rounds) == 7  # one of them to warm up
    assert all(sorted(turn) == names for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert {name: len(speeds) for name, speeds in result.items()} == dict.fromkeys(names, 6)


def test_the_order_is_the_seeds() -> None:
    logs: list[list[str]] = [[], []]
    for log in logs:
        interleave({name: note(log, name, 1) for name in "abcd"}, rounds=4, seed=9, warm_up_rounds=0)
    assert logs[0] == logs[1]


def test_throughput_is_items_a_second() -> None:
    speeds = interleave({"slow": note([], "slow", 10, 0.02)}, rounds=3, seed=0)["slow"]
    assert all(200 < speed <= 500 for speed in speeds)


def test_latency_items_are_spread_over_the_rounds() -> None:
    answered: list[int] = []
    result = interleave_latency({"one": (answered.append, list(range(7))), "two": (abs, [1, 2, 3])}, rounds=3, seed=0)
    assert sorted(answered) == list(range(7))
    assert sorted(len(part) for part in result["one"]) == [2, 2, 3]
    assert [len(part) for part in result["two"]] == [1, 1, 1]


def test_durations_are_milliseconds() -> None:
    spent = durations(time.sleep, [0.01, 0.0])
    assert 10.0 <= spent[0] < 1000.0
    assert spent[1] < spent[0]


def test_no_garbage_is_collected_while_timing() -> None:
    seen: list[bool] = []
    interleave({"look": lambda: seen.append(gc.isenabled()) or 1}, rounds=2, seed=0, warm_up_rounds=0)
    assert seen == [False, False]
    assert gc.isenabled()


def test_collection_comes_back_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()


def test_other_work_is_noticed() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        with watch_other_load() as load:
            time.sleep(0.5)
    finally:
        busy.kill()
        busy.wait()
    assert 0.0 < load.share <= 1.0


def test_known_percentiles() -> None:
    assert percentiles(list(range(101))) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_known_ratios() -> None:
    assert ratios([10.0, 20.0, 60.0], [5.0, 5.0, 20.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@given(Numbers)
def test_percentiles_ascend_within_the_sample(values: list[float]) -> None:
    result = percentiles(values)
    assert min(values) <= result["p50"] <= result["p95"] <= result["p99"] <= max(values)


@given(Numbers)
def test_nothing_is_faster_than_itself(values: list[float]) -> None:
    assert ratios(values, values) == {"median": 1.0, "low": 1.0, "high": 1.0}

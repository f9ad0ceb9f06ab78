from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.core.ladder import (
    CHAIN,
    FAIR,
    NAIVE,
    fastest_within_floor,
    headline,
    ladder_rows,
    points,
    rate,
    times,
    times_smaller,
)


def evaluation(over_fair: float, accuracy: float, difference: float, within: bool = True) -> dict[str, Any]:
    """Metrics of one variant; PyTorch's baselines answer 100 and 10 texts a second."""
    latency = {"p50": 20.0 / over_fair, "p95": 30.0 / over_fair, "p99": 40.0 / over_fair}
    return {
        "quality": {"accuracy": accuracy},
        "against_reference": {
            "metric": "accuracy",
            "difference": difference,
            "low": difference - 0.01,
            "high": difference + 0.01,
            "confidence": 0.95,
            "detectable_difference": 0.02,
            "within_floor": within,
        },
        "size": {"parameters": 1000, "model_bytes": round(8000 / over_fair)},
        "best": {
            "latency_runtime": "onnxruntime-cpu",
            "latency_ms": latency,
            "throughput_runtime": "openvino-cpu",
            "batch_size": 32,
            "texts_per_second": 100 * over_fair,
            "peak_memory_mb": 64.0,
        },
        "baselines": {
            "fair": {"texts_per_second": 100.0, "latency_ms": {"p50": 20.0, "p95": 30.0}},
            "naive": {"texts_per_second": 10.0, "latency_ms": {"p50": 400.0, "p95": 600.0}},
        },
        "speedup": {
            "throughput_over_fair": spread(over_fair),
            "throughput_over_naive": spread(10 * over_fair),
            "latency_over_fair": spread(over_fair),
            "latency_over_naive": spread(20 * over_fair),
        },
    }


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value * 0.9, "high": value * 1.1}


@pytest.fixture
def metrics() -> dict[str, dict[str, Any]]:
    return {
        "finetune": evaluation(2.0, 0.97, 0.0),
        "distill": evaluation(4.0, 0.965, -0.005),
        "prune": evaluation(5.0, 0.962, -0.008),
        "quantize": evaluation(10.0, 0.95, -0.02, within=False),
    }


def test_baselines_come_first_then_the_chain_whatever_the_order_given(metrics: dict[str, dict[str, Any]]) -> None:
    shuffled = {name: metrics[name] for name in ("quantize", "finetune", "prune", "distill")}
    rows = ladder_rows(shuffled)
    assert [row.name for row in rows] == [NAIVE, FAIR, *CHAIN]
    assert [row.parent for row in rows] == [None, NAIVE, FAIR, "finetune", "distill", "prune"]


def test_gains_over_parent_are_quotients_of_gains_over_the_fair_baseline(metrics: dict[str, dict[str, Any]]) -> None:
    rows = {row.name: row for row in ladder_rows(metrics)}
    assert [rows[name].over_parent for name in CHAIN] == pytest.approx([2.0, 2.0, 1.25, 2.0])
    assert rows[FAIR].over_parent == pytest.approx(10.0)
    assert rows[FAIR].over_naive.median == pytest.approx(10.0)
    assert rows[NAIVE].over_fair.median == pytest.approx(0.1)
    assert rows[FAIR].latency_over_naive.median == pytest.approx(20.0)


def test_a_slower_machine_during_one_evaluation_does_not_change_the_gain(metrics: dict[str, dict[str, Any]]) -> None:
    before = ladder_rows(metrics)[4].over_parent
    slow = metrics["prune"]
    slow["best"]["texts_per_second"] /= 2
    slow["baselines"]["fair"]["texts_per_second"] /= 2
    assert ladder_rows(metrics)[4].over_parent == before


def test_baselines_carry_the_quality_of_the_model_they_run(metrics: dict[str, dict[str, Any]]) -> None:
    metrics["finetune"] = evaluation(2.0, 0.968, -0.002)
    naive, fair = ladder_rows(metrics)[:2]
    assert naive.quality == fair.quality == pytest.approx(0.97)
    assert naive.difference is None
    assert fair.within_floor


def test_baseline_figures_are_medians_over_the_evaluations(metrics: dict[str, dict[str, Any]]) -> None:
    for number, name in enumerate(CHAIN):
        metrics[name]["baselines"]["fair"]["texts_per_second"] = 100.0 + number
    assert ladder_rows(metrics)[1].texts_per_second == pytest.approx(101.5)


def test_what_stands_beside_the_chain_comes_after_it_with_parents_of_its_own(
    metrics: dict[str, dict[str, Any]],
) -> None:
    both = {"cascade": evaluation(6.0, 0.969, -0.001), "quantize_finetuned": evaluation(4.0, 0.969, -0.001)}
    rows = ladder_rows(both | metrics)
    assert [row.name for row in rows] == [NAIVE, FAIR, *CHAIN, "quantize_finetuned", "cascade"]
    beside = rows[-2:]
    assert [row.parent for row in beside] == ["finetune", "quantize_finetuned"]
    assert [row.over_parent for row in beside] == pytest.approx([2.0, 1.5])
    assert fastest_within_floor(rows) == beside[1]
    assert headline(rows).startswith("The cascade model answers 600 texts a second")
    alone = ladder_rows({"finetune": metrics["finetune"], "cascade": both["cascade"]})
    assert alone[-1].parent == "finetune"


def test_the_answer_is_the_fastest_that_meets_the_floor_not_the_fastest(metrics: dict[str, dict[str, Any]]) -> None:
    rows = ladder_rows(metrics)
    best = fastest_within_floor(rows)
    assert best is not None
    assert best.name == "prune"
    assert times_smaller(best, rows) == pytest.approx(2.5)
    assert headline(rows) == (
        "The pruned model answers 500 texts a second: 5.0× the fair PyTorch baseline and 50× the naive one, "
        "in a file 2.5× smaller, at −0.8 points of accuracy (95% interval −1.8 to +0.2)."
    )


def test_no_model_within_the_floor_is_said_plainly(metrics: dict[str, dict[str, Any]]) -> None:
    for values in metrics.values():
        values["against_reference"]["within_floor"] = False
    rows = ladder_rows(metrics)
    assert fastest_within_floor(rows) is None
    assert headline(rows) == "No exported model meets the quality floor."


def test_one_variant_alone_has_a_ladder(metrics: dict[str, dict[str, Any]]) -> None:
    rows = ladder_rows({"distill": metrics["distill"]})
    assert [row.name for row in rows] == [NAIVE, FAIR, "distill"]
    assert rows[2].parent == FAIR
    assert rows[0].parameters is None  # the model of the baselines was not evaluated


def test_rows_become_json_and_table_rows(metrics: dict[str, dict[str, Any]]) -> None:
    row = ladder_rows(metrics)[-1]
    nested, flat = json.loads(json.dumps(row.to_dict())), row.to_flat()
    assert nested["over_fair"] == {"median": 10.0, "low": 9.0, "high": 11.0}
    assert (flat["over_fair"], flat["over_fair_low"], flat["over_fair_high"]) == (10.0, 9.0, 11.0)
    assert not any(isinstance(value, dict) for value in flat.values())


@pytest.mark.parametrize("metrics", [{}, {"squeeze": {}}])
def test_no_or_unknown_variants_are_refused(metrics: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected some of finetune, distill, prune, quantize"):
        ladder_rows(metrics)


@pytest.mark.parametrize(
    "path",
    [("best", "latency_ms", "p95"), ("speedup", "latency_over_naive", "high"), ("baselines", "naive")],
)
def test_a_missing_value_is_named(metrics: dict[str, dict[str, Any]], path: tuple[str, ...]) -> None:
    inner = metrics["prune"]
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    with pytest.raises(UserError, match=rf"artifacts/evaluate/prune/metrics.json: has no {'[.]'.join(path)}"):
        ladder_rows(metrics)


@pytest.mark.parametrize(
    ("value", "text"), [(1.037, "1.04×"), (7.24, "7.2×"), (260.4, "260×"), (1234.0, "1,234×"), (0.031, "0.03×")]
)
def test_gains_for_people(value: float, text: str) -> None:
    assert times(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0044, "−0.4"), (0.002, "+0.2"), (0.0, "0.0"), (-0.0001, "0.0"), (-0.1, "−10.0")]
)
def test_points_for_people(value: float, text: str) -> None:
    assert points(value) == text


@given(st.floats(min_value=0.01, max_value=1e6))
def test_rates_keep_two_digits_at_least(value: float) -> None:
    assert float(rate(value).replace(",", "")) == pytest.approx(value, abs=0.501 if value >= 100 else 0.0501)

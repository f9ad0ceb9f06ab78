from __future__ import annotations

import itertools
from pathlib import Path

import numpy
import pytest

from stages.core.cascade import CascadeModel, open_exported
from stages.core.choice import DEFAULT
from stages.core.runtimes import ExportedModel
from stages.evaluate import cost
from stages.evaluate.cost import (
    Service,
    count_operations,
    energy_per_thousand,
    latency_quantiles,
    measure_ceiling_share,
    price,
    texts_of_length,
)

TEXTS = ["what is the cat", "where is the river of london", "how many"]


def test_a_price_per_hour_becomes_one_per_million_texts() -> None:
    # A million texts at 100 a second take 10,000 s, 2.78 hours.
    assert price(100.0, 0.36) == {"price_per_million_texts": pytest.approx(1.0)}
    assert price(100.0, None) == {}


def test_energy_is_told_per_thousand_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 0.4)
    monkeypatch.setattr(cost.time, "monotonic", lambda: next(clock))
    readings = iter([100.0, 130.0])
    calls: list[int] = []
    # The clock lets two calls through: 30 J for 2 x 50 texts.
    assert energy_per_thousand(lambda: calls.append(1), 50, lambda: next(readings)) == pytest.approx(300.0)
    assert len(calls) == 2


def test_a_machine_that_tells_no_energy_costs_no_time() -> None:
    def fail() -> None:
        raise AssertionError("nothing to measure")

    assert energy_per_thousand(fail, 50, lambda: None) is None


def test_operations_are_those_of_the_torch_model(exported_unit: Path, tiny_checkpoint: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stages.core.checkpoints import load_model

    model = ExportedModel.load(exported_unit)
    texts = ["what is the cat of the hill ?"] * 2
    told = count_operations(Service(model, DEFAULT, texts, 1.0, 0.0))
    rows = torch.tensor(model.encode(texts[:1]))
    network = load_model(tiny_checkpoint)
    network.config._attn_implementation = "eager"
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(input_ids=rows, attention_mask=torch.ones_like(rows))
    products = counter.get_flop_counts()["Global"]
    linear = products[torch.ops.aten.addmm]
    assert told["tokens"] == rows.shape[1]
    assert told["int8"] == 0.0
    # The exported form answers from the first token alone and leaves the last layer's other tokens out.
    hidden, neurons, tokens = 32, 64, rows.shape[1]
    left_out = 2 * (tokens - 1) * (2 * hidden * hidden + 2 * hidden * neurons)
    assert told["per_text"] == linear - left_out


def test_a_cascade_counts_its_larger_model_for_what_is_passed_on(cascade_unit: Path) -> None:
    model = CascadeModel.load(cascade_unit)
    alone = count_operations(Service(model.large, DEFAULT, TEXTS, 1.0, 0.0))["per_text"]
    both = count_operations(Service(model, DEFAULT, TEXTS, 1.0, 0.25))["per_text"]
    assert both == pytest.approx(1.25 * alone)


def test_the_share_of_the_ceiling_as_worked_by_hand(exported_unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ExportedModel.load(exported_unit)
    monkeypatch.setattr(cost, "measure_products", lambda: {"fp32": 2.0, "bf16": 8.0, "int8": 16.0})
    monkeypatch.setattr(cost, "operations_by_kind", lambda path, tokens: {"float": 1e6, "int8": 4e6})
    service = Service(model, DEFAULT, TEXTS, 800.0, 0.0)
    found = measure_ceiling_share(service, open_exported(DEFAULT.runtime, model))
    # 1e6 at 2e9 a second and 4e6 at 16e9 are 0.75 ms of the 1.25 ms that a text takes.
    assert found["share"] == pytest.approx(0.6)
    monkeypatch.setattr(cost, "saturates", lambda model: True)
    found = measure_ceiling_share(service, open_exported(DEFAULT.runtime, model))
    assert found["share"] == pytest.approx(800 * 5e6 / 2e9)


def test_texts_are_cut_to_about_a_length(exported_unit: Path) -> None:
    model = ExportedModel.load(exported_unit)
    for length in (8, 12, 20):
        rows = model.encode(texts_of_length(model, TEXTS, length, 50, seed=1))
        assert len(rows) == 50
        # Half words at the ends fall into letters in this small vocabulary.
        assert 0 <= numpy.mean([len(row) for row in rows]) - length <= 4


def test_quantiles_join_the_rounds() -> None:
    table = latency_quantiles({"a": [[1.0, 2.0], [3.0]], "b": [[5.0], [5.0, 5.0]]})
    own = table[table["contender"] == "a"].set_index("share")["milliseconds"]
    assert own[0.5] == 2.0
    assert own[1.0] == 3.0
    assert (table[table["contender"] == "b"]["milliseconds"] == 5.0).all()

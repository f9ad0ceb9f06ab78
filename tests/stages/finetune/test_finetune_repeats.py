"""Several seeds and cross-validation: fair parts, the right spread, and one model at the end."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
from finetune_parts import TINY, Stage

from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples
from stages.core.params import parse_params
from stages.finetune.repeats import folds_of, joined, spread


def test_the_spread_of_known_scores() -> None:
    assert spread([0.9, 0.94, 0.92]) == pytest.approx(
        {"mean": 0.92, "standard_deviation": 0.02, "minimum": 0.9, "maximum": 0.94}
    )
    assert spread([0.9])["standard_deviation"] == 0.0


def numbered(labels: list[int], start: int = 0) -> Examples:
    names = [str(start + index) for index in range(len(labels))]
    return Examples(names, [[int(name)] for name in names], numpy.array(labels))


def test_every_text_is_held_out_once_and_decides_nothing_there() -> None:
    train, validation = numbered([0] * 24 + [1] * 12), numbered([0] * 6 + [1] * 3, start=36)
    parts = list(folds_of(train, validation, 3, seed=5))
    assert sorted(text for _, _, held_out in parts for text in held_out.texts) == sorted(map(str, range(45)))
    for fit_on, choose_by, held_out in parts:
        everything = [*fit_on.texts, *choose_by.texts, *held_out.texts]
        assert len(set(everything)) == len(everything) == 45
        assert held_out.labels.tolist().count(0) == 10
        assert len(choose_by) == 6  # a fifth, as in the given split
        assert choose_by.labels.tolist().count(0) == 4
        assert [int(row[0]) for row in fit_on.input_ids] == [int(text) for text in fit_on.texts]
    again = list(folds_of(train, validation, 3, seed=5))
    assert [part.texts for fold in again for part in fold] == [part.texts for fold in parts for part in fold]
    other = next(folds_of(train, validation, 3, seed=6))
    assert other[2].texts != parts[0][2].texts


def test_rare_labels_are_allowed_but_not_only_rare_ones() -> None:
    train, validation = numbered([0] * 9 + [1]), numbered([0, 0], start=10)
    assert len(list(folds_of(train, validation, 4, seed=1))) == 4
    with pytest.raises(UserError, match="finetune.repeats.folds: 12 parts, but no label has more than 11 texts"):
        list(folds_of(train, validation, 12, seed=1))


def test_one_fold_is_none() -> None:
    raw = copy.deepcopy(TINY)
    raw["finetune"]["repeats"] = {"seeds": 1, "folds": 1}
    with pytest.raises(UserError, match="finetune.repeats: folds must be 2 or more, or 0"):
        parse_params(raw, "here")


def test_one_training_says_nothing_of_repeats(finetune: Stage) -> None:
    metrics, run = finetune(epochs=1)
    assert metrics["seeds"] is metrics["folds"] is metrics["self_training"] is None
    assert "training" not in run.history[0]


def test_seeds_and_folds_are_told_and_resumed(finetune: Stage, tmp_path: Path) -> None:
    changes = {"repeats": {"seeds": 2, "folds": 2}, "epochs": 1}
    metrics, whole = finetune("whole", **changes)
    seeds, folds = metrics["seeds"], metrics["folds"]
    assert set(seeds["validation"]) == {"17", "18"}
    assert seeds["validation"]["17"] != seeds["validation"]["18"] or seeds["standard_deviation"] == 0.0
    assert seeds["mean"] == pytest.approx(numpy.mean(list(seeds["validation"].values())))
    assert metrics["validation"]["accuracy"] == seeds["validation"][str(seeds["kept_seed"])] == seeds["maximum"]
    assert set(folds["held_out"]) == {"1", "2"}
    assert folds["minimum"] <= folds["mean"] <= folds["maximum"]
    assert [row["training"] for row in whole.history] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(KeyboardInterrupt):
        finetune("broken", interrupt_at=12, **changes)
    assert (tmp_path / "state-broken/finetune-seed18").exists()
    resumed_metrics, resumed = finetune("broken", **changes)
    assert resumed_metrics == metrics
    assert resumed.history == whole.history
    weights = [(run.staging / "model/model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_seed_gives_what_it_gives_alone(finetune: Stage) -> None:
    """The first of several trainings is the one of a run without repeats, whatever came of the others."""
    alone, _ = finetune("alone", epochs=1)
    several, _ = finetune("several", epochs=1, repeats={"seeds": 2, "folds": 0})
    assert several["seeds"]["validation"]["17"] == alone["validation"]["accuracy"]


def test_joined_keeps_the_order(tiny_data: Path) -> None:
    first, second = load_examples(tiny_data, "train"), load_examples(tiny_data, "validation")
    both = joined(first, second)
    assert both.texts == first.texts + second.texts
    assert both.labels[len(first) :].tolist() == second.labels.tolist()

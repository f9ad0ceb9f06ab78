"""Self-training: which texts are taken, with which labels, and what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pandas
import pytest
import torch
from finetune_parts import TINY, Stage
from torch import Tensor, nn

from stages.core.errors import UserError
from stages.core.examples import Examples, load_examples, load_maximum_length
from stages.core.params import SelfTrainingParams, parse_params
from stages.core.training.recipe import Position
from stages.finetune.self_training import Learned, Pool, load_pool, pseudo_labelled, self_train, surest

ASKED = {"rounds": 2, "confidence": 0.5, "texts": 30, "candidates": 100, "pattern": r"\?$"}


def asked(**changes: Any) -> SelfTrainingParams:
    return SelfTrainingParams.model_validate({**ASKED, **changes})


class Sure(nn.Module):
    """Answers with the first token's number modulo 3, as surely as the second token says in percent."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        wanted = nn.functional.one_hot(input_ids[:, 0] % 3, 3)
        sure = input_ids[:, 1:2] / 100
        return SimpleNamespace(logits=torch.where(wanted == 1, sure, (1 - sure) / 2).log())


def pool_of(rows: list[list[int]]) -> Pool:
    return Pool(Examples([str(row) for row in rows], rows, numpy.full(len(rows), -1)), 0, "fp32")


def learned(model: nn.Module, score: float) -> Learned:
    return Learned(model, Position(best_score=score), 1, 60, score)


def test_the_surest_of_every_class_are_taken() -> None:
    confidence = numpy.array([0.9, 0.99, 0.8, 0.95, 0.7, 0.97, 0.6])
    labels = numpy.array([0, 0, 0, 0, 1, 2, 2])
    assert surest(confidence, labels, 3, asked(texts=6)) == [1, 3, 4, 5, 6]
    assert surest(confidence, labels, 3, asked(texts=6, confidence=0.75)) == [1, 3, 5]
    assert surest(confidence, labels, 3, asked(texts=3, confidence=0.99)) == [1]
    assert surest(confidence, labels, 3, asked(texts=2)) == []


def test_labels_are_the_models_own_answers() -> None:
    found = pseudo_labelled(Sure(), pool_of([[5, 90], [4, 60, 1, 1], [6, 45], [7, 80, 2]]), asked())
    assert found.input_ids == [[5, 90], [4, 60, 1, 1], [7, 80, 2]]
    assert found.labels.tolist() == [2, 1, 1]
    assert found.labels.dtype == numpy.int64
    assert len(pseudo_labelled(Sure(), pool_of([]), asked())) == 0


def test_the_best_teaches_the_next_round_and_is_kept() -> None:
    first, better, worse = learned(Sure(), 0.5), learned(Sure(), 0.7), learned(Sure(), 0.6)
    results, seen = iter([better, worse]), []

    def fit(name: str, examples: Examples) -> Learned:
        seen.append((name, examples.labels.tolist()))
        return next(results)

    known = Examples(["a"], [[1, 2]], numpy.array([0]))
    kept, told = self_train(first, known, pool_of([[5, 90]]), asked(), fit)
    assert kept is better
    assert seen == [("round1", [0, 2]), ("round2", [0, 2])]
    assert told == {
        "candidates": 1,
        "kept_round": 1,
        "rounds": {
            "0": {"taken": 0, "validation": 0.5},
            "1": {"taken": 1, "validation": 0.7},
            "2": {"taken": 1, "validation": 0.6},
        },
    }


def test_nothing_sure_enough_ends_it_and_a_tie_keeps_the_earlier() -> None:
    first, known = learned(Sure(), 0.5), Examples(["a"], [[1, 2]], numpy.array([0]))
    kept, told = self_train(first, known, pool_of([[5, 60]]), asked(confidence=0.9), lambda *_: pytest.fail("trained"))
    assert kept is first
    assert told["rounds"] == {"0": {"taken": 0, "validation": 0.5}, "1": {"taken": 0}}
    kept, told = self_train(first, known, pool_of([[5, 60]]), asked(rounds=1), lambda *_: learned(Sure(), 0.5))
    assert kept is first
    assert told["kept_round"] == 0


def test_candidates_match_the_pattern_and_are_not_known(tiny_data: Path, tmp_path: Path) -> None:
    known = load_examples(tiny_data, "train")
    texts = [known.texts[0].upper() + " ?", "where is the hill ?", "where is the hill", "Where is the hill?", "how ?"]
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "corpus.parquet")
    pool = load_pool(tmp_path, tiny_data, known, 0, asked(), "fp32", 1)
    assert sorted(text.lower().replace(" ", "") for text in pool.examples.texts) == ["how?", "whereisthehill?"]
    assert all(len(row) <= load_maximum_length(tiny_data) for row in pool.examples.input_ids)
    assert len(load_pool(tmp_path, tiny_data, known, 0, asked(candidates=1), "fp32", 1).examples) == 1
    assert not len(load_pool(tmp_path, tiny_data, known, 0, asked(pattern="no such"), "fp32", 1).examples)


def test_the_stage_reports_rounds_and_goes_on_where_it_was(finetune: Stage, tmp_path: Path) -> None:
    changes = {"self_training": {**ASKED, "rounds": 1, "confidence": 0.35}, "epochs": 1}
    metrics, whole = finetune("whole", **changes)
    told = metrics["self_training"]
    assert 0 < told["rounds"]["1"]["taken"] <= 30
    assert set(told["rounds"]) == {"0", "1"}
    assert [row["training"] for row in whole.history] == [1.0, 2.0]
    assert metrics["validation"]["accuracy"] == told["rounds"][str(told["kept_round"])]["validation"]
    with pytest.raises(KeyboardInterrupt):
        finetune("broken", interrupt_at=12, **changes)
    assert (tmp_path / "state-broken/finetune-round1").exists()
    resumed_metrics, resumed = finetune("broken", **changes)
    assert resumed_metrics == metrics
    assert resumed.history == whole.history
    weights = [(run.staging / "model/model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_pattern_must_be_one() -> None:
    raw = copy.deepcopy(TINY)
    raw["finetune"]["self_training"] = {**ASKED, "pattern": "("}
    with pytest.raises(UserError, match=r"finetune.self_training: pattern is no regular expression"):
        parse_params(raw, "here")

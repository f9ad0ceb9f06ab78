"""The training benchmark: what it counts, divides and writes; and one whole run of it on a model of no use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
import yaml
from torch import nn

from benchmarks.markers import put_between
from benchmarks.training.arithmetic import Arithmetic, count_arithmetic, mean_context, product_shapes
from benchmarks.training.contenders import CONTENDERS, TARGET_FINETUNE, TARGET_PRETRAIN, choose
from benchmarks.training.engine import stage_command
from benchmarks.training.judge import HeldOut, join
from benchmarks.training.page import MARKER, render
from benchmarks.training.peer import group
from benchmarks.training.picture import draw
from benchmarks.training.profile import OTHER, kind_of, seconds_by_kind
from benchmarks.training.settings import finetune_params, pretrain_params
from benchmarks.training.summary import (
    finetune_row,
    loss_difference,
    mean_curve,
    pretrain_row,
    reached_ratio,
    seconds_to,
    targets,
    tokens_per_second,
)
from benchmarks.training.watch import Asked, Enough, Watch
from stages.core.artifacts import write_json, write_manifest
from stages.core.errors import UserError
from stages.core.params import parse_params

ROOT = Path(__file__).parents[2]
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def run(seconds: list[float], tokens: list[int], curve: list[tuple[int, float, float]], **more: Any) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": tokens,
        "positions": [2 * count for count in tokens],
        "curve": curve,
        "peak_memory_mb": 800.0,
        "imports_memory_mb": 300.0,
        "process_seconds": 20.0,
        **more,
    }


OURS = [
    run([5.0, 6.0, 7.0, 8.0], [100, 200, 300, 400], [(4, 8.0, 6.5)], blocks_loss=6.4),
    run([5.0, 6.0, 6.5, 7.0], [100, 200, 300, 400], [(4, 7.0, 6.7)], blocks_loss=6.6),
]
THEIRS = [
    run([5.0, 8.0, 12.0, 16.0], [100, 200, 300, 400], [(4, 16.0, 6.6)], blocks_loss=6.5, peak_memory_mb=1600.0),
    run([5.0, 8.0, 10.0, 12.0], [100, 200, 300, 400], []),
]
RESULT: dict[str, Any] = {
    "command": "python -m benchmarks.training",
    "date": "2026-11-22",
    "rounds": 2,
    "accuracy": 0.93,
    "minutes": 9.0,
    "other_load": 0.02,
    "shared": {
        "precision": "bf16",
        "warmup": 0.1,
        "mask_probability": 0.15,
        "pretrain_batch_tokens": 2048,
        "pretrain_learning_rate": 1e-4,
        "finetune_batch_tokens": 448,
        "finetune_batch_texts": 32,
        "finetune_learning_rate": 1e-4,
        "finetune_epochs": 3,
        "finetuned_epochs": 2,
    },
    "facts": {
        "pretrain": {
            "steps": 4,
            "length": 128,
            "texts": 90,
            "mean_tokens": 21.0,
            "context": 50.0,
            "heldout_texts": 8,
            "arithmetic": {"body": 1000, "head": 2000, "layers": 2, "width": 10},
        },
        "finetune": {"labels": 6, "texts": 4513, "mean_tokens": 13.5, "judge_every": 17, "validation_texts": 322},
    },
    "ceilings": [{"square": 2e-3, "shapes": 1e-3}, {"square": 4e-3, "shapes": 2e-3}],
    "profiles": {},
    "failures": {},
    "threads": {},
    "hardware": {
        "cpu": {"model": "A processor", "logical_cores": 2, "features": ["avx2"]},
        "memory_gib": 23.5,
        "system": {"os": "Linux", "python": "3.11"},
    },
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def tiny_language_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6)
    return BertForMaskedLM(config)


def test_arithmetic_of_a_model_counted_by_hand(tiny_language_model: Any) -> None:
    found = count_arithmetic(tiny_language_model)
    assert found == Arithmetic(body=2 * (4 * 4 * 4 + 2 * 4 * 6), head=4 * 4 + 4 * 11, layers=2, width=4)
    # 6 a weight; the head's at a quarter of the tokens; scores and sum over 3 tokens in each of 2 layers.
    assert found.operations_per_token(0.25, 3.0) == 6 * (224 + 0.25 * 60) + 6 * 2 * 2 * 4 * 3
    shapes = product_shapes(tiny_language_model, tokens=8, hidden=2)
    assert shapes.count((8, 4, 4)) == 8
    assert shapes.count((2, 4, 4)) == 1
    assert (2, 4, 11) in shapes
    assert len(shapes) == 14


def test_a_token_attends_to_its_own_text() -> None:
    assert mean_context([2, 6]) == (4 + 36) / 8


def test_speed_leaves_out_the_steps_that_warm_up() -> None:
    assert tokens_per_second(OURS[0]) == 100.0
    assert tokens_per_second(THEIRS[1]) == 50.0
    assert tokens_per_second(run([2.0], [100], [])) == 50.0


def test_rows_ratios_and_targets_are_taken_round_by_round() -> None:
    mine = pretrain_row(BY_NAME["pretrain-headroom"], OURS, RESULT)
    other = pretrain_row(BY_NAME[TARGET_PRETRAIN], THEIRS, RESULT)
    assert mine.tokens_per_second == (100.0, 200.0)
    assert other.tokens_per_second == (25.0, 50.0)
    needed = 6 * (1000 + 0.15 * 2000) + 6 * 2 * 2 * 10 * 50
    assert mine.ceiling == pytest.approx((100 * needed / 2e6, 200 * needed / 4e6))
    assert mine.shapes_ceiling == pytest.approx((100 * needed / 1e6, 200 * needed / 2e6))
    assert (mine.padding, mine.tokens_per_step) == (0.5, 100.0)
    found = {target.what: target for target in targets([mine, other], [])}
    speed = found[f"pretraining, tokens a second against {other.contender.title}"]
    assert (speed.ratio["median"], speed.met) == (4.0, True)
    memory = found[f"pretraining, resident memory against {other.contender.title}"]
    assert (memory.ratio["low"], memory.ratio["high"], memory.met) == (0.5, 1.0, True)


def test_losses_are_compared_with_the_same_seed_only() -> None:
    mine = pretrain_row(BY_NAME["pretrain-headroom"], OURS, RESULT)
    other = pretrain_row(BY_NAME[TARGET_PRETRAIN], THEIRS, RESULT)
    found = loss_difference(mine.heldout, other.heldout)
    assert found == pytest.approx({"mean": -0.1, "low": -0.1, "high": -0.1, "spread": 0.2})
    assert loss_difference(mine.heldout, {}) is None


def _classifiers() -> tuple[Any, Any]:
    mine = [
        run([1.0], [10], [(5, 4.0, 0.7), (10, 8.0, 0.96), (15, 12.0, 0.97)]),
        run([1.0], [10], [(5, 5.0, 0.9), (10, 9.0, 0.92)]),
    ]
    other = [
        run([1.0], [10], [(5, 12.0, 0.8), (10, 24.0, 0.94)]),
        run([1.0], [10], [(5, 12.0, 0.9), (10, 24.0, 0.94)]),
    ]
    return (
        finetune_row(BY_NAME["finetune-headroom"], mine, 0.93),
        finetune_row(BY_NAME[TARGET_FINETUNE], other, 0.93),
    )


def test_time_to_an_accuracy_is_that_of_the_mean_curve() -> None:
    mine, other = _classifiers()
    assert mean_curve(mine.curves) == [(5, 4.5, pytest.approx(0.8)), (10, 8.5, pytest.approx(0.94))]
    assert mine.seconds() == pytest.approx(4.5 + 4.0 * 13 / 14)
    assert other.seconds() == pytest.approx(12.0 + 12.0 * 8 / 9)
    assert mine.seconds(without=0) is None  # the second curve never gets there
    assert mine.seconds(without=1) == pytest.approx(4.0 + 4.0 * 23 / 26)
    found = reached_ratio(mine, other)
    alone = (12.0 + 12.0 * 13 / 14) / (4.0 + 4.0 * 23 / 26)
    whole = (12.0 + 12.0 * 8 / 9) / (4.5 + 4.0 * 13 / 14)
    assert found == pytest.approx({"median": whole, "low": 0.0, "high": alone})  # we never get there on the second seed
    assert seconds_to([], 0.5) is None
    assert seconds_to([(5, 4.0, 0.8)], 0.4) == 2.0
    assert reached_ratio(mine, finetune_row(BY_NAME[TARGET_FINETUNE], [run([1.0], [1], [])] * 2, 0.93)) is None


def test_the_page_tells_ratio_loss_and_who_did_not_get_there(tmp_path: Path) -> None:
    rows = [
        pretrain_row(BY_NAME["pretrain-headroom"], OURS, RESULT),
        pretrain_row(BY_NAME[TARGET_PRETRAIN], THEIRS, RESULT),
    ]
    classifiers = _classifiers()
    kinds = seconds_by_kind([("aten::mm", 0.5)])
    result = {
        **RESULT,
        "profiles": {"one": {"title": "One", "task": "finetune", "steps": 20, "step_seconds": 1.0, "kinds": kinds}},
        "failures": {"x": "no"},
    }
    text = render(rows, classifiers, targets(rows, classifiers), result)
    assert "| 38 (25 to 50) | 4.00 (4.00 to 4.00) x | 50 % | 100 | 6.600 | 6.500 | -0.100 (" in text
    assert "| 22.7 | 2.76 (0.00 to 3.07) x | 94.0 (94.0 to 94.0) |" in text
    assert "the mean curve of all 2 seeds" in text
    assert "| fine-tuning, mean of 20 steps | One |" in text
    assert "| matrix products | 500 ms, 50 % |" in text
    assert "Failed: x: no" in text
    page = put_between("# Title\n<!-- bench-training -->\nold\n<!-- /bench-training -->\nend\n", MARKER, text, "page")
    assert "old" not in page
    assert page.startswith("# Title\n<!-- bench-training -->\n`")
    assert page.endswith("\n<!-- /bench-training -->\nend\n")
    draw(rows, {"pretrain-headroom": OURS, TARGET_PRETRAIN: THEIRS}, CONTENDERS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(UserError, match=r"page\.md: needs the lines"):
        put_between("# Title\n", MARKER, "text", "page.md")
    put_between((ROOT / "docs" / "training.md").read_text(), MARKER, "text", "docs/training.md")


def test_a_name_that_fits_nobody_is_refused() -> None:
    assert {each.task for each in choose(["finetune"])} == {"finetune"}
    left_out = {each.name for each in CONTENDERS} - {each.name for each in choose([])}
    assert [each.name for each in choose(["pretrain-headroom"])] == ["pretrain-headroom"]
    assert left_out == {"finetune-trainer-by-length", "pretrain-headroom-compiled"}
    with pytest.raises(UserError, match="--only olive"):
        choose(["olive"])


@pytest.mark.parametrize("preset", ["questions", "reviews"])
def test_the_changed_params_are_valid(preset: str) -> None:
    base = yaml.safe_load((ROOT / "presets" / f"{preset}.yaml").read_text())
    params = parse_params(pretrain_params(base, 16, 4096, 0.1), "params")
    assert (params.pretrain.steps, params.tokenize.block_length) == (16, 128)
    assert parse_params(finetune_params(base), "params").finetune.label_smoothing == 0.0


def test_stages_are_called_as_dvc_calls_them() -> None:
    assert stage_command("pretrain")[:3] == ["stages.pretrain", "--checkpoint", "artifacts/acquire/checkpoint"]
    assert stage_command("finetune")[-2:] == ["--out", "artifacts/finetune"]


def test_texts_are_joined_as_each_side_does_it() -> None:
    rows = [[2, 5, 6, 3], [2, 7, 3], [2, 8, 3]]
    assert group(rows, 4) == [[2, 5, 6, 3], [2, 7, 3, 2]]
    assert join(rows, 4) == [[2, 5, 6, 3], [2, 7, 3, 8]]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::_softmax", "softmax, layer norm, GELU, dropout"),
        ("aten::embedding_dense_backward", "embedding"),
        ("aten::copy_", "copies and casts"),
        ("aten::erfinv", OTHER),
    ],
)
def test_operations_have_a_kind(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


class _Words(nn.Module):
    """Predicts from a table; enough for a watch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_the_watch_counts_tokens_of_texts_and_stops_the_run() -> None:
    model, judged = _Words(), []
    asked = Asked(last_step=3, judge_at=[2], judge=lambda model: judged.append(model.training) or 0.5)  # type: ignore[func-returns-value]
    watch = Watch(asked, torch.tensor([0, 2, 3]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    with pytest.raises(Enough), watch.watching(model):
        for _ in range(9):
            model(ids).logits.sum().backward()
            with torch.no_grad():
                model(ids)  # an evaluation trains nothing
            optimizer.step()
    assert watch.tokens == [3, 6, 9]
    assert watch.positions == [8, 16, 24]
    assert [step for step, _, _ in watch.curve] == [2]
    assert judged == [False]
    assert model.training
    assert watch.peak_memory_mb > 0
    optimizer.step()
    assert len(watch.seconds) == 3


def test_held_out_loss_of_a_model_that_knows_nothing() -> None:
    model = _Words()
    nn.init.zeros_(model.table.weight)
    heldout = HeldOut([[2, *([5] * 40), 3], [2, 6, 7, 3]], torch.tensor([0, 2, 3]), mask_id=4, pad_id=0)
    assert heldout.loss(model) == pytest.approx(torch.log(torch.tensor(11.0)).item(), abs=1e-3)


def _finished_run(artifacts: Path, checkpoint: Path, tokenizer: Path) -> None:
    """What the benchmark reads of a finished run, small."""
    from transformers import BertConfig

    acquired = artifacts / "acquire" / "checkpoint"
    acquired.mkdir(parents=True)
    BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    ).save_pretrained(acquired)
    corpus = artifacts / "clean" / "corpus"
    corpus.mkdir(parents=True)
    texts = [f"where is the {town} of the {animal} ?" for town in ("hill", "river") for animal in ("cat", "dog")] * 400
    pandas.DataFrame({"text": texts}).to_parquet(corpus / "corpus.parquet", index=False)
    (artifacts / "tokenize").mkdir()
    shutil.copytree(tokenizer, artifacts / "tokenize" / "tokenizer")
    lexicon = artifacts / "acquire" / "lexicon"
    lexicon.mkdir()
    (lexicon / "synonyms.txt").write_text("hill, mound\n")
    for folder in (acquired, corpus, lexicon, artifacts / "tokenize" / "tokenizer"):
        write_manifest(folder)


def test_the_whole_of_it(tmp_path: Path, tiny_tokenizer: Path, tiny_data: Path) -> None:
    """Headroom and the Trainer really train, in processes of their own; nothing is written in the finished run."""
    artifacts, docs = tmp_path / "artifacts", tmp_path / "docs"
    _finished_run(artifacts, tmp_path, tiny_tokenizer)
    shutil.copytree(tiny_data, artifacts / "tokenize" / "data")
    clean = artifacts / "clean" / "data"
    clean.mkdir()
    write_json(clean / "labels.json", json.loads((tiny_data / "labels.json").read_text()))
    labels = json.loads((tiny_data / "labels.json").read_text())
    for split in ("train", "validation", "test"):
        table = pandas.read_parquet(tiny_data / f"{split}.parquet")
        frame = pandas.DataFrame({"text": table["text"], "label": [labels[index] for index in table["label"]]})
        frame.to_parquet(clean / f"{split}.parquet", index=False)
    write_manifest(clean)
    docs.mkdir()
    (docs / "training.md").write_text(f"# Training\n\n<!-- {MARKER} -->\n<!-- /{MARKER} -->\n")
    before = sorted(str(path) for path in artifacts.rglob("*"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.training", "--artifacts", str(artifacts), "--docs", str(docs)),
            *("--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.json")),
            *("--params", str(ROOT / "presets" / "tiny.yaml"), "--rounds", "1", "--tokens", "8192"),
            *("--only", "pretrain-headroom", "pretrain-trainer-grouped", "finetune-headroom"),
            *("--accuracy", "0.2", "--profile"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["failures"] == {}
    for name in ("pretrain-headroom", "pretrain-trainer-grouped"):
        (only,) = result["runs"][name]
        assert len(only["seconds"]) == result["facts"]["pretrain"]["steps"] == 4
        assert only["positions"][-1] == 4 * 2048
        assert 0 < only["tokens"][-1] < only["positions"][-1]
        assert only["curve"][-1][2] < 5.0
    finetuned = result["runs"]["finetune-headroom"]
    assert len(finetuned) == 2
    assert all(each["curve"][-1][0] == len(each["seconds"]) for each in finetuned)
    assert set(result["profiles"]) == set(result["runs"])
    assert all(each["step_seconds"] > 0 for each in result["profiles"].values())
    headline = json.loads(done.stdout.splitlines()[-1])
    assert headline["failures"] == {}
    assert "Headroom, packed" in (docs / "training.md").read_text()
    assert (docs / "training.png").exists()
    assert sorted(str(path) for path in artifacts.rglob("*")) == before


def test_a_missing_run_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--artifacts", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "checkpoint/config.json: no such file" in done.stderr

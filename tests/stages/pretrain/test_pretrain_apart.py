"""Blocks of several documents: each is learnt from as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from pretraining_parts import LENGTH, FakeRun, params_for, scratch, sentences

from stages.core.errors import UserError
from stages.core.packing import PADDED
from stages.pretrain.__main__ import Pretraining, run_pretrain
from stages.pretrain.blocks import Blocks
from stages.pretrain.objectives import build_objective
from stages.tokenize.pack import hold_out, pack_apart


@pytest.fixture(scope="module")
def apart(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of the sentences, packed whole."""
    rows = tokenizer(sentences(), add_special_tokens=False)["input_ids"]
    blocks, documents = pack_apart(rows, tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id, LENGTH)
    folder = tmp_path_factory.mktemp("apart")
    for name, chosen in zip(("train", "heldout"), hold_out(numpy.arange(len(blocks)), 0.2, 0), strict=True):
        kind = pyarrow.list_(pyarrow.int32())
        columns = {"input_ids": blocks[chosen], "documents": documents[chosen]}
        table = {column: pyarrow.array(list(values), type=kind) for column, values in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet")
    return folder


PAIRS = [("bert", "masked"), ("gpt2", "causal"), ("llama", "causal"), ("electra", "replaced_tokens")]


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_documents_kept_apart_teach_something(
    family: str, kind: str, apart: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    checkpoint = scratch(tmp_path / "checkpoint", family)
    run: Any = FakeRun(
        tmp_path / "run", params_for(kind), checkpoint=checkpoint, tokenizer=tokenizer_folder, blocks=apart
    )
    metrics = run_pretrain(run)
    assert metrics["after"]["heldout_loss"] < metrics["before"]["heldout_loss"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_packed_document_is_guessed_as_it_is_alone(family: str, apart: Path, tokenizer: Any, tmp_path: Path) -> None:
    params = params_for("causal")
    objective = build_objective(params.pretrain.objective, scratch(tmp_path, family), tokenizer, LENGTH)
    objective.model.eval()
    blocks = Blocks(apart, 1, 16 * LENGTH, 0)
    assert blocks.train_documents is not None
    ids, documents = blocks.train[:4], blocks.train_documents[:4]
    assert int(documents.max()) > 0  # several in a block
    whole = {**objective.prepare(ids, 0.0, torch.Generator()), "documents": documents}
    parts = [
        objective.prepare(row[own == number].unsqueeze(0), 0.0, torch.Generator())
        for row, own in zip(ids, documents, strict=True)
        for number in range(int(own.max()) + 1)
    ]
    with torch.inference_mode():
        alone = sum(float(objective.loss(part)) * objective.weight(part) for part in parts)
        assert sum(map(objective.weight, parts)) == objective.weight(whole)
        assert float(objective.loss(whole)) == pytest.approx(alone / objective.weight(whole), rel=1e-4)


def test_bytes_are_counted_for_each_token_that_is_guessed(apart: Path, tokenizer: Any, tmp_path: Path) -> None:
    params = params_for("causal")
    objective = build_objective(params.pretrain.objective, scratch(tmp_path, "gpt2"), tokenizer, LENGTH)
    blocks, run = Blocks(apart, 1, 16 * LENGTH, 0), FakeRun(tmp_path, params)
    told = Pretraining(objective, blocks, tokenizer, run)  # type: ignore[arg-type]
    rows, documents = blocks.heldout[:64], blocks.heldout_documents[:64]
    texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
    guessed = sum(int((own == number).sum()) - 1 for own in documents for number in range(int(own.max()) + 1))
    assert told.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / guessed)
    assert int((documents == PADDED).sum()) > 0


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [
        ("t5", "span_corruption", "kind span_corruption reads a block as one text; set it to joined"),
        ("xlnet", "masked", "XLNetLMHeadModel cannot keep the documents of a block apart"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(
    family: str, kind: str, reason: str, apart: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    checkpoint = scratch(tmp_path / "checkpoint", family)
    run: Any = FakeRun(
        tmp_path / "run", params_for(kind), checkpoint=checkpoint, tokenizer=tokenizer_folder, blocks=apart
    )
    with pytest.raises(UserError, match=reason):
        run_pretrain(run)


def test_the_held_out_loss_is_the_mean_over_tokens_however_they_are_batched(
    apart: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_for("causal")
    objective = build_objective(params.pretrain.objective, scratch(tmp_path, "gpt2"), tokenizer, LENGTH)
    objective.model.eval()
    run: Any = FakeRun(tmp_path / "run", params)
    pretraining = Pretraining(objective, Blocks(apart, 1, 16 * LENGTH, 0), tokenizer, run)
    found = []
    for size in (1, 1000):
        monkeypatch.setattr("stages.pretrain.__main__._HELDOUT_BATCH", size)
        found.append(pretraining.evaluate()[1]["heldout_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)

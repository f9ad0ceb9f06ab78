"""Tokenizers and blocks of a tiny corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from pretraining_parts import LENGTH, sentences

from stages.core.params import TrainedTokenizer
from stages.tokenize.pack import hold_out, pack
from stages.tokenize.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tokenizers of each kind, trained on the sentences."""
    folders = {}
    for kind in ("wordpiece", "bpe", "unigram"):
        params = TrainedTokenizer.model_validate({"kind": kind, "vocabulary_size": 300, "lowercase": True})
        folders[kind] = tmp_path_factory.mktemp(kind)
        train_tokenizer(params, sentences(), 64).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizers_of: dict[str, Path]) -> Path:
    """The WordPiece tokenizer's folder."""
    return tokenizers_of["wordpiece"]


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The WordPiece tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def blocks_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed blocks of the sentences, as tokenize writes them."""
    rows = tokenizer(sentences(), add_special_tokens=False)["input_ids"]
    folder = tmp_path_factory.mktemp("blocks")
    parts = hold_out(pack(rows, tokenizer.sep_token_id, tokenizer.cls_token_id, LENGTH), 0.2, 0)
    for name, part in zip(("train", "heldout"), parts, strict=True):
        column = pyarrow.array(list(part), type=pyarrow.list_(pyarrow.int32()))
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": column}), folder / f"{name}.parquet")
    return folder

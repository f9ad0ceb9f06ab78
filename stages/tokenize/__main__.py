"""Command line of the tokenize stage."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import pyarrow.parquet

from stages.core.artifacts import read_json, write_json
from stages.core.checkpoints import copy_tokenizer, load_tokenizer
from stages.core.errors import UserError
from stages.core.examples import SPLITS, load_dataset
from stages.core.observe.progress import track
from stages.core.packing import PADDED
from stages.core.params import TokenizeParams, TrainedTokenizer
from stages.core.stage import StageRun, command
from stages.tokenize.pack import hold_out, pack, pack_apart, spread
from stages.tokenize.train import train_tokenizer

_TEXTS_PER_BATCH = 1000


def run_tokenize(run: StageRun) -> dict[str, Any]:
    """Tokenize the splits and pack the corpus."""
    params = run.params.tokenize
    data, corpus = run.inputs["data"], load_dataset(run.inputs["corpus"] / "corpus.parquet")
    splits = {split: load_dataset(data / f"{split}.parquet") for split in SPLITS}
    tokenizer = _tokenizer(params, run.inputs["checkpoint"], [*corpus["text"], *splits["train"]["text"]])
    folder = run.unit("tokenizer")
    tokenizer.save_pretrained(folder)

    out = run.unit("data")
    labels = read_json(data / "labels.json")
    write_json(out / "labels.json", labels)
    write_json(out / "tokens.json", {"maximum_length": params.maximum_length, "pad_id": tokenizer.pad_token_id})
    (out / "tokenizer").mkdir()
    copy_tokenizer(folder, out / "tokenizer")
    tokenized = {split: _tokenize_split(splits[split], tokenizer, params, labels) for split in SPLITS}
    for split, dataset in tokenized.items():
        pyarrow.parquet.write_table(dataset.data.table, out / f"{split}.parquet")
    _write_lengths(run.staging / "lengths.csv", tokenized)

    packed, blocks = _pack_corpus(run, tokenizer, corpus["text"]), run.unit("blocks")
    rows = hold_out(numpy.arange(len(packed["input_ids"])), params.heldout_fraction, run.params.seed)
    for name, chosen in zip(("train", "heldout"), rows, strict=True):
        _write_blocks(blocks / f"{name}.parquet", {column: values[chosen] for column, values in packed.items()})
    return {
        "vocabulary": len(tokenizer),
        "corpus_tokens": int(packed["input_ids"].size),
        "corpus_padding": float((packed["documents"] == PADDED).mean()) if "documents" in packed else 0.0,
        "splits": {split: _describe(dataset, tokenizer, params) for split, dataset in tokenized.items()},
    }


def _tokenizer(params: TokenizeParams, checkpoint: Path, texts: Iterable[str]) -> Any:
    if isinstance(params.tokenizer, TrainedTokenizer):
        return train_tokenizer(params.tokenizer, texts, params.maximum_length)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UserError(f"{checkpoint}: the tokenizer has neither sep_token nor eos_token to end a text with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token  # decoders have none, and mask what is padded
    config = read_json(checkpoint / "config.json")
    positions = config.get("max_position_embeddings", config.get("n_positions", params.maximum_length))
    for name in ("maximum_length", "block_length"):
        if getattr(params, name) > positions:
            raise UserError(
                f"params.yaml: tokenize.{name}: {getattr(params, name)}, the checkpoint takes up to {positions}"
            )
    return tokenizer


def _tokenize_split(
    dataset: datasets.Dataset, tokenizer: Any, params: TokenizeParams, labels: Sequence[str]
) -> datasets.Dataset:
    index = {label: number for number, label in enumerate(labels)}

    others = [name for name in dataset.column_names if name not in ("text", "label")]

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=params.maximum_length)["input_ids"]
        return {"input_ids": encoded, "label": [index[label] for label in rows["label"]]}

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.Value("int64"),
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            **{name: datasets.Value("string") for name in others},
        }
    )
    return dataset.map(encode, batched=True, features=features, remove_columns=["label"], keep_in_memory=True)


def _pack_corpus(run: StageRun, tokenizer: Any, texts: Sequence[str]) -> dict[str, numpy.ndarray]:
    """Tokenize an even sample of the corpus, until there are enough tokens, and pack it; columns of the blocks."""
    params = run.params.tokenize
    rows: list[list[int]] = []
    tokens = 0
    for batch in track(_batches(texts, params.corpus_tokens), "tokenize corpus"):
        encoded = tokenizer(batch, add_special_tokens=False)["input_ids"]
        rows += encoded
        tokens += sum(map(len, encoded))
        if tokens >= params.corpus_tokens:
            break
    separator = _first_of(tokenizer.sep_token_id, tokenizer.eos_token_id)
    begin = _first_of(tokenizer.cls_token_id, tokenizer.bos_token_id, separator)
    count = params.corpus_tokens // params.block_length
    if params.documents == "joined":
        return {"input_ids": pack(rows, separator, begin, params.block_length)[:count]}
    blocks, documents = pack_apart(rows, separator, begin, tokenizer.pad_token_id, params.block_length)
    # Best fit puts the longest documents first; a sample of the blocks must hold short ones too.
    sample = numpy.random.default_rng(run.params.seed).permutation(len(blocks))[:count]
    return {"input_ids": blocks[sample], "documents": documents[sample]}


def _first_of(*ids: int | None) -> int:
    """The first id of a special token that the tokenizer has; there is one, as `_tokenizer` saw to."""
    return next(index for index in ids if index is not None)


def _batches(texts: Sequence[str], tokens: int) -> Iterator[list[str]]:
    """Batches over an even sample that is large enough, at four characters or more a token."""
    if tokens == 0 or not texts:
        return
    characters = sum(map(len, texts)) / len(texts)
    wanted = spread(len(texts), int(tokens * 8 / max(characters, 1.0)) + _TEXTS_PER_BATCH)
    for start in range(0, len(wanted), _TEXTS_PER_BATCH):
        yield [texts[index] for index in wanted[start : start + _TEXTS_PER_BATCH]]


def _write_blocks(path: Path, columns: dict[str, numpy.ndarray]) -> None:
    kind = pyarrow.list_(pyarrow.int32())
    table = {name: pyarrow.array(list(rows), type=kind) for name, rows in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def _write_lengths(path: Path, tokenized: dict[str, datasets.Dataset]) -> None:
    """How many texts of each length, in tokens, each split has."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["split", "length", "count"])
        for split, dataset in tokenized.items():
            counts = Counter(map(len, dataset["input_ids"]))
            writer.writerows([split, length, counts[length]] for length in sorted(counts))


def _describe(dataset: datasets.Dataset, tokenizer: Any, params: TokenizeParams) -> dict[str, float]:
    lengths = numpy.array([len(row) for row in dataset["input_ids"]])
    special = tokenizer.num_special_tokens_to_add()
    unknown = sum(row.count(tokenizer.unk_token_id) for row in dataset["input_ids"])
    words = sum(len(text.split()) for text in dataset["text"])
    pieces = int((lengths - special).sum())
    return {
        "texts": len(lengths),
        "mean_length": float(lengths.mean()),
        "p95_length": float(numpy.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "cut": int((lengths >= params.maximum_length).sum()),
        "unknown_rate": unknown / max(pieces, 1),
        "tokens_per_word": pieces / max(words, 1),
    }


if __name__ == "__main__":
    command("tokenize", run_tokenize, inputs=("data", "corpus", "checkpoint"))

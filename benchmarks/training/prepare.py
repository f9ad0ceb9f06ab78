"""The folders that both sides train in: laid out as a checkout is, made of a finished run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from benchmarks.methods.declared import changed
from benchmarks.training.arithmetic import count_arithmetic, mean_context, product_shapes
from benchmarks.training.engine import run_stage
from benchmarks.training.settings import SHARED, finetune_params, pretrain_params
from stages.core.artifacts import ARTIFACTS, read_json, write_json, write_manifest
from stages.core.checkpoints import WEIGHTS_FILE, copy_tokenizer, load_tokenizer
from stages.core.encoding import TOKENIZER_FILE
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_labels

BASE_PARAMS = "base.yaml"
FACTS = "facts.json"
ROWS = "rows.json"
CHECKPOINT = ARTIFACTS / "acquire" / "checkpoint"
_HELDOUT_TEXTS = 256
_SPARE_BLOCKS = 4
"""That the stage holds out for its own evaluation."""
_TEXTS_AT_ONCE = 4000


def prepare_pretraining(
    artifacts: Path, params: Mapping[str, Any], tokens: int, folder: Path, seed: int
) -> dict[str, Any]:
    """Make the folder of the masked language models: a start for all, a corpus, and its blocks by the tokenize stage.

    Args:
        artifacts: of a finished run.
        params: a whole params file.
        tokens: to train on.
        folder: to make.
        seed: of the choice of texts and of the fresh head.

    Returns:
        facts that the runs and the page need, also in the folder.
    """
    tokenizer = artifacts / "tokenize" / "tokenizer"
    model = _masked_language_model(artifacts / "acquire" / "checkpoint", tokenizer, seed)
    length = min(SHARED.block_length, model.config.max_position_embeddings)
    steps = max(4, tokens // SHARED.pretrain_batch_tokens)
    blocks = steps * max(1, SHARED.pretrain_batch_tokens // length) + _SPARE_BLOCKS
    train, heldout = _choose_texts(artifacts, length - 2, blocks * length, seed)
    _write_checkpoint(model, tokenizer, folder / CHECKPOINT)
    _link(artifacts / "clean" / "data", folder / ARTIFACTS / "clean" / "data")
    corpus = folder / ARTIFACTS / "clean" / "corpus"
    corpus.mkdir(parents=True)
    pandas.DataFrame({"text": [text for text, _ in train]}).to_parquet(corpus / "corpus.parquet", index=False)
    write_manifest(corpus)
    taken = {"acquire.checkpoint": {"kind": "local", "path": str(CHECKPOINT)}, "tokenize.tokenizer.kind": "checkpoint"}
    base = changed(pretrain_params(params, steps, blocks * length, _SPARE_BLOCKS / blocks), taken)
    base["tokenize"] |= {"tokenizer": {"kind": "checkpoint"}, "block_length": length, "maximum_length": length}
    _write_params(base, folder)
    run_stage("tokenize", folder)
    lengths = [len(ids) - 2 for _, ids in train]
    mean = sum(lengths) / len(lengths)
    hidden = round(SHARED.mask_probability * SHARED.pretrain_batch_tokens)
    facts = {
        "steps": steps,
        "length": length,
        "texts": len(train),
        "mean_tokens": mean,
        "longest": max(lengths),
        "context": mean_context(lengths),
        "texts_per_step": max(1, round(SHARED.pretrain_batch_tokens / (mean + 1))),  # a separator follows each
        "heldout_texts": len(heldout),
        "arithmetic": dataclasses.asdict(count_arithmetic(model)),
        "shapes": product_shapes(model, SHARED.pretrain_batch_tokens, hidden),
    }
    write_json(folder / FACTS, facts)
    write_json(folder / ROWS, {"train": [ids for _, ids in train], "heldout": [ids for _, ids in heldout]})
    return facts


def prepare_finetuning(
    artifacts: Path, params: Mapping[str, Any], folder: Path, checkpoint: Path, evaluations: int
) -> dict[str, Any]:
    """Make the folder of the classifiers: the finished run's data, and the acquired checkpoint to start from.

    Args:
        artifacts: of a finished run.
        params: a whole params file.
        folder: to make.
        checkpoint: to start from where the acquired one has no weights.
        evaluations: an epoch.

    Returns:
        facts that the runs and the page need, also in the folder.
    """
    acquired = artifacts / "acquire" / "checkpoint"
    for found in sorted(artifacts.iterdir()):
        if found.is_dir() and not found.name.startswith(".") and found.name not in ("pretrain", "finetune", "mlflow"):
            _link(found, folder / ARTIFACTS / found.name)
    start = acquired if (acquired / WEIGHTS_FILE).exists() else checkpoint
    _link(start, folder / ARTIFACTS / "pretrain" / "model")
    _write_params(finetune_params(params), folder)
    data = folder / ARTIFACTS / "tokenize" / "data"
    train = load_examples(data, "train")
    steps = -(-len(train) // SHARED.finetune_batch_texts)
    facts = {
        "texts": len(train),
        "validation_texts": len(load_examples(data, "validation")),
        "labels": len(load_labels(data)),
        "mean_tokens": sum(map(len, train.input_ids)) / len(train),
        "judge_every": max(1, steps // evaluations),
    }
    write_json(folder / FACTS, facts)
    return facts


def _masked_language_model(checkpoint: Path, tokenizer: Path, seed: int) -> Any:
    """The acquired model under one fresh head, or one of fresh weights where it has none: the start of all runs."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if (checkpoint / WEIGHTS_FILE).exists():
        return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint, use_safetensors=True, dtype=torch.float32)
    loaded = load_tokenizer(tokenizer)
    config.vocab_size, config.pad_token_id = len(loaded), loaded.pad_token_id
    return transformers.AutoModelForMaskedLM.from_config(config)


def _write_checkpoint(model: Any, tokenizer: Path, folder: Path) -> None:
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    write_manifest(folder)


def _choose_texts(
    artifacts: Path, longest: int, wanted: int, seed: int
) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]]]:
    """Draw texts of the corpus with their token ids, the two special ones included; each is cut at `longest` tokens.

    Returns:
        texts of `wanted` tokens together, a separator each included, and held-out ones.
    """
    texts = pandas.read_parquet(artifacts / "clean" / "corpus" / "corpus.parquet")["text"].tolist()
    random.Random(seed).shuffle(texts)
    tokenizer = Tokenizer.from_file(str(artifacts / "tokenize" / "tokenizer" / TOKENIZER_FILE))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest + 2)
    chosen: list[tuple[str, list[int]]] = []
    tokens = 0
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[first : first + _TEXTS_AT_ONCE]
        for text, encoding in zip(part, tokenizer.encode_batch(part), strict=True):
            chosen.append((text[: max(end for _, end in encoding.offsets)], encoding.ids))
            tokens += len(encoding.ids) - 1
        if tokens >= wanted * (1 + _HELDOUT_TEXTS / len(chosen)):
            break
    heldout, train = chosen[:_HELDOUT_TEXTS], _until(chosen[_HELDOUT_TEXTS:], wanted)
    if not train:
        raise UserError(f"{artifacts / 'clean' / 'corpus'}: {len(texts)} texts are too few to train on and to hold out")
    return train, heldout


def _until(texts: Sequence[tuple[str, list[int]]], wanted: int) -> list[tuple[str, list[int]]]:
    """The first texts, as many as make up the tokens wanted."""
    total = 0
    for number, (_, ids) in enumerate(texts):
        total += len(ids) - 1  # packed, it needs one separator
        if total >= wanted:
            return list(texts[: number + 1])
    return list(texts)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)


def _write_params(params: Mapping[str, Any], folder: Path) -> None:
    for name in (BASE_PARAMS, "params.yaml"):
        (folder / name).write_text(yaml.safe_dump(dict(params), sort_keys=False), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `prepare_pretraining` or `prepare_finetuning` found."""
    facts: dict[str, Any] = read_json(folder / FACTS)
    return facts

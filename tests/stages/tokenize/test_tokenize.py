from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import write_json
from stages.core.errors import UserError
from stages.core.params import CheckpointTokenizer, TrainedTokenizer, parse_params
from stages.tokenize.__main__ import _pack_corpus, _tokenize_split, _tokenizer
from stages.tokenize.pack import hold_out, pack, spread
from stages.tokenize.train import train_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a quick dog and a lazy fox",
    "Where is the river? The river is in the town.",
    "héllo wörld, numbers 123 and more",
] * 20


def test_pack_joins_and_cuts_as_worked_by_hand() -> None:
    blocks = pack([[5, 6], [7], [8, 9, 10]], separator=3, begin=2, length=4)
    # stream: 5 6 3 7 3 8 9 10 3
    assert blocks.tolist() == [[2, 5, 6, 3], [2, 7, 3, 8], [2, 9, 10, 3]]


def test_a_rest_is_dropped_and_nothing_packs_to_nothing() -> None:
    assert pack([[5, 6]], 3, 2, 4).tolist() == [[2, 5, 6, 3]]
    assert pack([[5]], 3, 2, 4).shape == (0, 4)
    assert pack([], 3, 2, 4).shape == (0, 4)


@given(st.lists(st.lists(st.integers(5, 99), max_size=12), max_size=20), st.integers(2, 9))
def test_packing_keeps_every_token_in_order(rows: list[list[int]], length: int) -> None:
    blocks = pack(rows, separator=3, begin=2, length=length)
    stream = [token for row in rows for token in [*row, 3]]
    packed = blocks[:, 1:].flatten().tolist()
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < length - 1
    assert (blocks[:, 0] == 2).all()


def test_hold_out_parts_the_blocks() -> None:
    blocks = numpy.arange(40).reshape(20, 2)
    train, held = hold_out(blocks, 0.1, seed=0)
    assert (len(train), len(held)) == (18, 2)
    assert sorted(numpy.concatenate([train, held])[:, 0].tolist()) == blocks[:, 0].tolist()
    assert [len(part) for part in hold_out(blocks[:1], 0.4, 0)] == [1, 0]


@given(st.integers(0, 500), st.integers(1, 500))
def test_spread_is_even_and_without_repeats(count: int, wanted: int) -> None:
    chosen = spread(count, wanted)
    assert len(set(chosen)) == len(chosen) == min(count, wanted)
    assert all(0 <= index < count for index in chosen)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_trained_tokenizers_know_their_texts(kind: str, tmp_path: Path) -> None:
    size = 400 if kind == "bpe" else 120
    params = TrainedTokenizer(kind=kind, vocabulary_size=size, lowercase=True)  # type: ignore[arg-type]
    tokenizer = train_tokenizer(params, TEXTS, maximum_length=32)
    assert len(tokenizer) <= size
    row = tokenizer("the quick fox")["input_ids"]
    assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in row
    assert tokenizer.decode(row, skip_special_tokens=True).split() == ["the", "quick", "fox"]
    assert tokenizer("THE Quick fox")["input_ids"] == row
    tokenizer.save_pretrained(tmp_path)
    from stages.core.checkpoints import load_tokenizer

    assert load_tokenizer(tmp_path)("the quick fox")["input_ids"] == row


def test_further_columns_travel_with_their_texts() -> None:
    params = TrainedTokenizer(kind="wordpiece", vocabulary_size=120, lowercase=True)
    tokenizer = train_tokenizer(params, TEXTS, maximum_length=16)
    whole = yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text())
    settings = parse_params(whole, "params.yaml").tokenize
    plain = {"text": ["the fox", "a dog"], "label": ["y", "x"]}
    tokenized = [
        _tokenize_split(datasets.Dataset.from_dict(rows), tokenizer, settings, ["x", "y"])
        for rows in (plain, {**plain, "country": ["de", ""]})
    ]
    assert tokenized[0].column_names == ["text", "label", "input_ids"]
    assert tokenized[1].remove_columns("country").to_dict() == tokenized[0].to_dict()
    assert tokenized[1]["country"][:] == ["de", ""]
    assert tokenized[1]["label"][:] == [1, 0]


def _checkpoint(folder: Path, **roles: str) -> Path:
    """A checkpoint whose tokenizer has these special tokens and no others."""
    trained = train_tokenizer(TrainedTokenizer(kind="bpe", vocabulary_size=400, lowercase=True), TEXTS, 32)
    trained.backend_tokenizer.post_processor = None
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **roles)
    plain.save_pretrained(folder)
    write_json(folder / "config.json", {"model_type": "gpt2", "n_positions": 32})
    return folder


@pytest.mark.parametrize(
    ("roles", "begin", "separator", "pad"),
    [
        ({"bos_token": "[UNK]", "eos_token": "[SEP]"}, "[UNK]", "[SEP]", "[SEP]"),  # as GPT-2 and Llama
        ({"eos_token": "[SEP]", "pad_token": "[PAD]"}, "[SEP]", "[SEP]", "[PAD]"),  # as T5
        ({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, "[CLS]", "[SEP]", "[PAD]"),  # as BERT
    ],
)
def test_blocks_begin_and_end_texts_with_what_the_tokenizer_has(
    roles: dict[str, str], begin: str, separator: str, pad: str, tmp_path: Path
) -> None:
    preset = parse_params(yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text()), "")
    params = preset.tokenize.model_copy(update={"tokenizer": CheckpointTokenizer(kind="checkpoint")})
    tokenizer = _tokenizer(params, _checkpoint(tmp_path, **roles), TEXTS)
    assert tokenizer.pad_token == pad
    run: Any = SimpleNamespace(params=preset)
    blocks = _pack_corpus(run, tokenizer, TEXTS)["input_ids"]
    assert set(blocks[:, 0].tolist()) == {tokenizer.convert_tokens_to_ids(begin)}
    assert (blocks[:, 1:] == tokenizer.convert_tokens_to_ids(separator)).sum() >= len(TEXTS) - 8


def test_a_tokenizer_that_ends_no_text_and_a_model_too_short_are_refused(tmp_path: Path) -> None:
    preset = parse_params(yaml.safe_load((Path(__file__).parents[3] / "presets" / "tiny.yaml").read_text()), "")
    params = preset.tokenize.model_copy(update={"tokenizer": CheckpointTokenizer(kind="checkpoint")})
    with pytest.raises(UserError, match="neither sep_token nor eos_token"):
        _tokenizer(params, _checkpoint(tmp_path / "a", pad_token="[PAD]"), TEXTS)
    longer = params.model_copy(update={"block_length": 33})
    with pytest.raises(UserError, match=r"tokenize\.block_length: 33, the checkpoint takes up to 32"):
        _tokenizer(longer, _checkpoint(tmp_path / "b", eos_token="[SEP]"), TEXTS)

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stages.core.artifacts import read_json, write_json, write_manifest
from stages.core.checkpoints import copy_tokenizer, load_model, load_tokenizer, save_model
from stages.core.errors import UserError
from stages.core.examples import load_examples, load_pad_id
from stages.core.judging import predict_logits
from stages.core.onnx_graph import export_onnx
from stages.core.params import TrainedTokenizer
from stages.core.runtimes import REFERENCE_RUNTIME, ExportedModel, open_runtime, predict
from stages.prune.vocabulary import tokens_to_keep, trim_tokenizer, trim_vocabulary
from stages.quantize.recipes import quantizable_layers, quantize_model
from stages.tokenize.train import train_tokenizer

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
LINES = Path(__file__).parents[3].joinpath("presets/tiny/corpus.txt").read_text(encoding="utf-8").splitlines()
OWN, CORPUS, UNSEEN = LINES[:15], LINES[15:30], LINES[120:200]


def _wordpiece(tokens: Sequence[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, tokens.index(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ids)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def _bert(size: int, **ids: int) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **ids
    )
    return BertForSequenceClassification(config).eval()


def _trim(model: Any, folder: Path, out: Path, own: Sequence[str], corpus: Sequence[str], count: int) -> dict[str, int]:
    """Trim and write a checkpoint to `out`."""
    trimmed = trim_vocabulary(model, folder, own, corpus, count)
    out.mkdir()
    save_model(model, out, folder, [])
    trimmed.write(out)
    return trimmed.metrics


def _pieces(folder: Path, texts: Sequence[str]) -> list[list[str]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.tokens for encoding in tokenizer.encode_batch(list(texts))]


def test_what_stays_by_hand_and_ids_move_with_the_tokens(tmp_path: Path) -> None:
    tokens = ["dog", "a", "##a", "[PAD]", "cat", "##ts", "[UNK]", "[CLS]", "cats", "[SEP]", "bird"]
    _wordpiece(tokens, tmp_path)
    model = _bert(len(tokens), pad_token_id=3, bos_token_id=7)
    old = model.get_input_embeddings().weight.detach().clone()
    metrics = _trim(model, tmp_path, tmp_path / "out", ["cats a"], ["bird dog bird"], 2)
    kept = ["a", "##a", "[PAD]", "[UNK]", "[CLS]", "cats", "[SEP]", "bird"]
    assert list(read_json(tmp_path / "out" / "tokenizer.json")["model"]["vocab"]) == kept
    reloaded: Any = load_model(tmp_path / "out")
    assert torch.equal(reloaded.get_input_embeddings().weight, old[[tokens.index(token) for token in kept]])
    assert reloaded.get_input_embeddings().padding_idx == reloaded.config.pad_token_id == kept.index("[PAD]")
    assert (reloaded.config.vocab_size, reloaded.config.bos_token_id) == (8, kept.index("[CLS]"))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer("cats a")["input_ids"] == [kept.index(token) for token in ("[CLS]", "cats", "a", "[SEP]")]
    assert (tokenizer.pad_token_id, len(tokenizer)) == (kept.index("[PAD]"), 8)
    assert metrics == {
        "tokens_before": 11,
        "tokens_after": 8,
        "embedding_bytes_saved": 3 * 16 * 4,
        "own_texts": 1,
        "own_texts_encoded_differently": 0,
        "corpus_texts": 1,
        "corpus_texts_encoded_differently": 1,
    }


def test_an_unknown_word_stays_unknown(tmp_path: Path) -> None:
    # WordPiece takes "ab", finds no "##x" and gives up; without "ab" it would find a and ##bx.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "c", "ab", "##bx"]
    _wordpiece(tokens, tmp_path)
    _trim(_bert(len(tokens)), tmp_path, tmp_path / "out", ["abx", "cbx"], [], 1)
    assert _pieces(tmp_path / "out", ["abx", "cbx"]) == [["[CLS]", "[UNK]", "[SEP]"], ["[CLS]", "c", "##bx", "[SEP]"]]


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tokenizer trained on all lines, and of the same trimmed to some of them."""
    folder = tmp_path_factory.mktemp(request.param)
    params = TrainedTokenizer(kind=request.param, vocabulary_size=2000, lowercase=True)
    tokenizer = train_tokenizer(params, LINES, 32)
    tokenizer.save_pretrained(folder)
    metrics = _trim(_bert(len(tokenizer)), folder, folder / "out", OWN, CORPUS, 1)
    assert metrics["own_texts_encoded_differently"] == metrics["corpus_texts_encoded_differently"] == 0
    assert metrics["tokens_after"] < 0.9 * metrics["tokens_before"]
    return folder, folder / "out"


def test_no_encoding_of_the_texts_at_hand_changes(trained: tuple[Path, Path]) -> None:
    before, after = trained
    assert _pieces(after, [*OWN, *CORPUS]) == _pieces(before, [*OWN, *CORPUS])
    whole, trimmed = load_tokenizer(before), load_tokenizer(after)
    for text in [*OWN, *CORPUS]:
        ids = trimmed(text)["input_ids"]
        assert trimmed.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(whole(text)["input_ids"])


def test_unseen_text_encodes_by_smaller_pieces(trained: tuple[Path, Path]) -> None:
    whole, trimmed = (load_tokenizer(folder) for folder in trained)
    assert _pieces(trained[1], UNSEEN) != _pieces(trained[0], UNSEEN)
    for text in UNSEEN:
        assert trimmed.decode(trimmed(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet="abc é☃", max_size=12), min_size=1, max_size=6), st.integers(1, 3))
def test_any_texts_keep_their_encoding(texts: list[str], count: int) -> None:
    lines = ["abc", "ab", "aab cab", "bca é", "cc ☃", *texts]
    for kind in ("wordpiece", "bpe", "unigram"):
        params = TrainedTokenizer(kind=kind, vocabulary_size=300, lowercase=True)  # type: ignore[arg-type]
        backend = train_tokenizer(params, lines, 32).backend_tokenizer
        description = json.loads(backend.to_str())
        wanted = [encoding.tokens for encoding in backend.encode_batch(texts)]
        needed = {token for encoding in backend.encode_batch(texts) for token in encoding.ids}
        trimmed = Tokenizer.from_str(json.dumps(trim_tokenizer(description, tokens_to_keep(description, needed, ""))))
        for text, tokens in zip(texts, wanted, strict=True):
            assert "[UNK]" in tokens or trimmed.encode(text).tokens == tokens


def test_bpe_keeps_what_the_kept_are_merged_from() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "ca": 6}
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["c", "a"]]
    description = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "added_tokens": []}
    kept = tokens_to_keep(description, [5], "")
    assert kept == [0, 1, 2, 3, 5]
    trimmed = trim_tokenizer(description, kept)["model"]
    assert trimmed["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    assert trimmed["merges"] == [["a", "b"], ["ab", "c"]]
    old = copy.deepcopy(description)
    old["model"]["merges"] = [" ".join(merge) for merge in merges]  # type: ignore[index]
    assert trim_tokenizer(old, tokens_to_keep(old, [5], ""))["model"]["merges"] == ["a b", "ab c"]


def test_unigram_keeps_the_least_likely_piece_that_prices_the_unknown() -> None:
    pieces = [["[UNK]", 0.0], ["a", -1.0], ["aa", -2.0], ["aaa", -9.0]]
    description = {"model": {"type": "Unigram", "vocab": pieces, "unk_id": 0}, "added_tokens": []}
    assert tokens_to_keep(description, [1], "") == [0, 1, 3]


def test_a_tokenizer_without_smaller_pieces_is_refused() -> None:
    description = {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []}
    with pytest.raises(UserError, match="WordLevel tokenizer has no smaller pieces"):
        tokens_to_keep(description, [0], "tokenizer.json")


def test_roberta_keeps_its_padding_id_from_which_positions_count(tmp_path: Path) -> None:
    tokens = ["dog", "[CLS]", "[PAD]", "bird", "[UNK]", "[SEP]", "cat"]
    _wordpiece(tokens, tmp_path)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=2,
        bos_token_id=1, eos_token_id=5,
    )  # fmt: skip
    model: Any = RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[1, 6, 5]])).logits
    _trim(model, tmp_path, tmp_path / "out", ["cat"], [], 1)
    reloaded = load_model(tmp_path / "out")
    ids = load_tokenizer(tmp_path / "out")("cat", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1, 5, 4]]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, wanted, atol=0, rtol=0)


@pytest.fixture
def trimmed(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without the tokens that its data's training and validation texts do not need."""
    own = load_examples(tiny_data, "train").texts[:9]
    _trim(load_model(tiny_checkpoint), tiny_checkpoint, tmp_path / "trimmed", own, [], 1)
    return tmp_path / "trimmed"


def test_a_trimmed_checkpoint_answers_alike_through_every_later_stage(
    trimmed: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole, model = load_model(tiny_checkpoint), load_model(trimmed)
    old = load_examples(tiny_data, "train", tiny_checkpoint)
    new, pad_id = load_examples(tiny_data, "train", trimmed), load_pad_id(tiny_data, trimmed)
    assert old.input_ids == load_examples(tiny_data, "train").input_ids
    assert old.input_ids[:9] != new.input_ids[:9]
    wanted = predict_logits(whole, old.input_ids[:9], 0)
    torch.testing.assert_close(predict_logits(model, new.input_ids[:9], pad_id), wanted, atol=1e-6, rtol=0)

    names = quantizable_layers(whole)
    quantized = [quantize_model(each, dict.fromkeys(names)) for each in (whole, model)]
    logits = [
        predict_logits(quantized[0], old.input_ids[:9], 0),
        predict_logits(quantized[1], new.input_ids[:9], pad_id),
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=0)

    unit = tmp_path / "model"
    unit.mkdir()
    export_onnx(model, unit / "model.onnx", ["input_ids", "attention_mask"], "logits", opset=20)
    copy_tokenizer(trimmed, unit)
    description = {"task": "text-classification", "labels": ["animal", "number", "place"], "maximum_length": 24}
    description |= {"pad_id": pad_id, "inputs": ["input_ids", "attention_mask"], "quantized": False, "parameters": 1}
    write_json(unit / "headroom.json", description | {"lineage": []})
    write_manifest(unit)
    exported = ExportedModel.load(unit)
    assert exported.encode(old.texts) == new.input_ids
    answers = predict(exported, open_runtime(REFERENCE_RUNTIME, exported), old.texts[:9], 4)[1]
    torch.testing.assert_close(torch.from_numpy(answers), wanted.softmax(dim=1), atol=1e-5, rtol=0)


def test_padding_is_found_by_its_name(tiny_data: Path, tmp_path: Path) -> None:
    tokens = ["a", "[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    _wordpiece(tokens, tmp_path)
    assert load_pad_id(tiny_data) == 0
    assert load_pad_id(tiny_data, tmp_path) == 4
    shutil.copy(tiny_data / "tokenizer" / "tokenizer.json", tmp_path)
    assert load_pad_id(tiny_data, tmp_path) == 0
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("[PAD]", "[FILL]")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"has no \[PAD\]"):
        load_pad_id(tiny_data, tmp_path)

"""Tokenizers trained from text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stages.core.params import TrainedTokenizer

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_UNKNOWN = SPECIAL_TOKENS["unk_token"]


def train_tokenizer(params: TrainedTokenizer, texts: Iterable[str], maximum_length: int) -> Any:
    """Train a tokenizer with BERT's special tokens.

    Args:
        params: kind, vocabulary size and case.
        texts: to learn from.
        maximum_length: told to users of the tokenizer.

    Returns:
        a `PreTrainedTokenizerFast` that wraps texts as [CLS] text [SEP].
    """
    tokenizer, trainer = {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}[params.kind](
        params.vocabulary_size
    )
    tokenizer.normalizer = _normalizer(params.lowercase)
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=maximum_length, **SPECIAL_TOKENS
    )


def _wordpiece(size: int) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=size, special_tokens=_special(), show_progress=False)


def _bpe(size: int) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_special(), initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def _unigram(size: int) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=_special(), unk_token=_UNKNOWN, show_progress=False
    )
    return tokenizer, trainer


def _normalizer(lowercase: bool) -> Any:
    steps: list[Any] = [normalizers.NFKC()]
    if lowercase:
        steps += [normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    return normalizers.Sequence(steps)


def _special() -> list[str]:
    return list(SPECIAL_TOKENS.values())

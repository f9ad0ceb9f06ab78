from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from stages.core.judging import predict_logits
from stages.core.metrics import softmax
from stages.explain.reader import (
    NO_WORD,
    Reader,
    Reading,
    ids_with,
    log_odds,
    odds_when_absent,
    probability,
    read_together,
    split_words,
    sum_by_word,
)


def letters_only() -> Tokenizer:
    """A tokenizer that knows no word, so that every word falls into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is  the Hill ?", ["What", "is", "the", "Hill", "?"]),
        ("don't stop", ["don", "'", "t", "stop"]),
        ("很好 ok", ["很", "好", "ok"]),
        ("", []),
    ],
)
def test_words_are_found(text: str, words: list[str]) -> None:
    assert [text[slice(*span)] for span in split_words(text)] == words


def test_two_vocabularies_meet_in_the_same_words(reader: Reader) -> None:
    words, (whole, pieces) = read_together("where is London", [reader, replace(reader, tokenizer=letters_only())])
    assert words == ["where", "is", "London"]
    assert whole.owners == [NO_WORD, 0, 1, 2, NO_WORD]
    assert pieces.owners == [NO_WORD, *[0] * 5, *[1] * 2, *[2] * 6, NO_WORD]
    numpy.testing.assert_allclose(sum_by_word(pieces, numpy.ones(20)), [5, 2, 6])


def test_words_that_one_model_cuts_off_are_left_out(reader: Reader) -> None:
    short = letters_only()
    short.enable_truncation(9)
    words, (whole, pieces) = read_together("where is london", [reader, replace(reader, tokenizer=short)])
    assert words == ["where", "is"]
    assert whole.owners == [NO_WORD, 0, 1, NO_WORD, NO_WORD]
    assert pieces.count_words() == 2


def test_a_token_that_counts_the_space_before_its_word_belongs_to_the_word(reader: Reader) -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    words, (reading,) = read_together("one two", [replace(reader, tokenizer=tokenizer)])
    assert words == ["one", "two"]
    assert reading.owners == [0, 1]


def test_absent_words_are_masked_and_special_tokens_stay() -> None:
    reading = Reading([2, 10, 11, 12, 3], [NO_WORD, 0, 0, 1, NO_WORD])
    assert ids_with(reading, numpy.array([False, True]), 4) == [2, 4, 4, 12, 3]


def test_odds_are_those_of_the_model(reader: Reader) -> None:
    _, (reading,) = read_together("what is the cat", [reader])
    present = numpy.array([[True] * 4, [False] * 4, [True] * 4])
    (odds,) = odds_when_absent(reader, [reading], [1], [present])
    rows = [reading.input_ids, [2, 4, 4, 4, 4, 3]]
    expected = softmax(predict_logits(reader.model, rows, reader.pad_id).double().numpy())[:, 1]
    numpy.testing.assert_allclose(probability(odds), expected[[0, 1, 0]], rtol=1e-5)


def test_log_odds_of_large_logits_are_finite() -> None:
    logits = numpy.array([[1000.0, 0.0, 0.0], [-1000.0, 0.0, 0.0]])
    expected = [1000.0 - numpy.log(2), -1000.0 - numpy.log(2)]
    numpy.testing.assert_allclose(log_odds(logits, numpy.array([0, 0])), expected)

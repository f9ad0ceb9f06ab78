"""More labelled texts: copies of the training texts that say nearly the same and keep the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from stages.core.artifacts import read_json
from stages.core.augmentation import guessed_copies
from stages.core.checkpoints import load_tokenizer
from stages.core.encoding import encode, read_tokenizer
from stages.core.errors import UserError
from stages.core.examples import Examples, load_maximum_length
from stages.core.params import AugmentationParams, FinetuneAugmentation, WordEdits
from stages.finetune.word_edits import edited


def add_copies(
    examples: Examples,
    params: FinetuneAugmentation,
    data: Path,
    language_model: Path,
    lexicon: Path | None,
    seed: int,
) -> Examples:
    """Put the copies that params ask for behind the examples.

    Args:
        examples: of the training split.
        params: which copies.
        data: tokenized splits, with their tokenizer.
        language_model: checkpoint folder that guesses words.
        lexicon: folder with `synonyms.json`; None where the stage was given none.
        seed: of all chance.

    Raises:
        UserError: if copies need a lexicon or a masked-language head and there is none.
    """
    more = examples
    if params.edits is not None:
        more = _joined(more, edited_examples(examples, params.edits, data, _synonyms(params.edits, lexicon), seed))
    if params.guesses is not None:
        more = _joined(more, guessed_examples(examples, params.guesses, data, language_model, seed))
    return more


def edited_examples(
    examples: Examples, params: WordEdits, data: Path, synonyms: Mapping[str, Sequence[str]], seed: int
) -> Examples:
    """Copies with words edited; a text that no edit can change has none."""
    texts, labels, known = [], [], set(examples.texts)
    for copy in range(params.copies):
        for text, label in zip(examples.texts, examples.labels.tolist(), strict=True):
            changed = edited(text, params, synonyms, seed, copy)
            if changed not in known:
                known.add(changed)
                texts.append(changed)
                labels.append(label)
    rows = encode(read_tokenizer(data / "tokenizer", load_maximum_length(data)), texts)
    return Examples(texts, rows, numpy.array(labels, dtype=numpy.int64))


def guessed_examples(
    examples: Examples, params: AugmentationParams, data: Path, language_model: Path, seed: int
) -> Examples:
    """Copies with some tokens guessed anew by the pretrained language model; see `guessed_copies`."""
    _check_language_model(language_model)
    tokenizer: Any = load_tokenizer(data / "tokenizer")
    known = {tuple(row) for row in examples.input_ids}
    rows, labels = [], []
    for copy in guessed_copies(examples.input_ids, params, language_model, tokenizer, seed):
        for row, label in zip(copy, examples.labels.tolist(), strict=True):
            if tuple(row) not in known:
                known.add(tuple(row))
                rows.append(row)
                labels.append(label)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []
    return Examples(texts, rows, numpy.array(labels, dtype=numpy.int64))


def _check_language_model(folder: Path) -> None:
    names = read_json(folder / "config.json").get("architectures") or [""]
    if not names[0].endswith("ForMaskedLM"):
        raise UserError(
            f"finetune.augmentation.guesses: {folder} is {names[0] or 'of no known architecture'}, which has no "
            "masked-language head; pretrain with masked tokens, or write null"
        )


def _synonyms(params: WordEdits, lexicon: Path | None) -> dict[str, list[str]]:
    if not (params.synonyms or params.insertions):
        return {}
    if lexicon is None:
        raise UserError(
            "finetune.augmentation.edits: synonyms and insertions need words that mean the same; "
            "give the stage a --lexicon, or set both to 0.0"
        )
    found: dict[str, list[str]] = read_json(lexicon / "synonyms.json")
    return found


def _joined(examples: Examples, more: Examples) -> Examples:
    return Examples(
        examples.texts + more.texts,
        examples.input_ids + more.input_ids,
        numpy.concatenate([examples.labels, more.labels]),
    )

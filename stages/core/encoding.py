"""Texts as token ids, by `tokenizer.json` alone: a serving process has no transformers in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from stages.core.errors import UserError

TOKENIZER_FILE = "tokenizer.json"


def read_tokenizer(folder: Path, maximum_length: int) -> Tokenizer:
    """Load a tokenizer that pads nothing and cuts texts at so many tokens, special tokens included.

    Raises:
        UserError: if the folder has none.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; export the model again, or `dvc checkout` to restore it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(maximum_length)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts into token ids, special tokens included. An empty text is a text."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast([_encodable(text) for text in texts])]


def _encodable(text: str) -> str:
    """JSON can carry half a surrogate pair, which no UTF-8 text can; it becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")

"""Plain text for pretraining, out of prose, tables and nested JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.acquire.text import column_of, text_of
from stages.core.errors import UserError
from stages.core.params import CorpusParams
from stages.core.tables import decode, parse_json, read_bytes, read_table, table_format

_BLANK_LINE = re.compile(r"\n(?:[^\S\n]*\n)+")


def read_corpus(path: Path, name: str, params: CorpusParams, where: str) -> list[str]:
    """Read the texts of one file of a corpus.

    Args:
        path: the file.
        name: of the file in its source, for messages.
        params: format, encoding and where the texts are.
        where: name of the param, for messages.

    Raises:
        UserError: if the file is not what the params say or holds no text.
    """
    format = table_format(path, params.format)
    if params.json_path is not None and params.text_column is not None:
        raise UserError(f"{where}: json_path and text_column are both set; set one of them to null")
    if params.json_path is not None:
        texts = _read_json(path, name, format, params, where)
    elif format == "txt":
        if params.text_column is not None:
            raise UserError(f"{where}.text_column: txt has no columns; set it to null")
        texts = paragraphs(decode(read_bytes(path), params.encoding, name))
    elif params.text_column is None:
        needed = "json_path or text_column" if format == "json" else "text_column"
        raise UserError(f"{where}: {needed} must say where in {name} the texts are")
    else:
        frame = read_table(path, format, params.encoding)
        cells = column_of(frame, params.text_column, name, f"{where}.text_column")
        texts = [text_of(cell, f"{name}: row {row}") for row, cell in enumerate(cells, start=1)]
    if not any(text.strip() for text in texts):
        raise UserError(f"{where}: {name} holds no text")
    return texts


def paragraphs(text: str) -> list[str]:
    """Cut prose at its blank lines, or, where it has none, at every line; blank pieces are dropped."""
    text = text.replace("\r\n", "\n").strip()
    pieces = _BLANK_LINE.split(text) if _BLANK_LINE.search(text) else text.split("\n")
    return [" ".join(piece.split("\n")) for piece in pieces if piece.strip()]


def texts_at(value: Any, path: Sequence[str], where: str) -> Iterator[str]:
    """Yield the strings at a path in a JSON value, in the order of the document.

    Args:
        value: the parsed document.
        path: keys, indices, or `*` for every element of a list or value of an object; what a path does not fit is
            passed over.
        where: names the document in messages.

    Raises:
        UserError: if something at the end of the path is not a string.
    """
    if not path:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise UserError(
                f"{where}: json_path ends at a {type(value).__name__}, {str(value)[:40]!r}, not at a string"
            )
        return
    step, rest = path[0], path[1:]
    for child in _children(value, step):
        yield from texts_at(child, rest, where)


def _children(value: Any, step: str) -> list[Any]:
    if step == "*":
        return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, dict):
        return [value[step]] if step in value else []
    if isinstance(value, list) and step.isdigit() and int(step) < len(value):
        return [value[int(step)]]
    return []


def _read_json(path: Path, name: str, format: str, params: CorpusParams, where: str) -> list[str]:
    if format not in ("json", "jsonl"):
        raise UserError(f"{where}.json_path: {format} is not json; set json_path to null")
    text = decode(read_bytes(path), params.encoding, name)
    if format == "json":
        document = parse_json(text, name)
    else:
        document = [
            parse_json(line, f"{name}: record {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    found = list(texts_at(document, str(params.json_path).split("."), name))
    if not found:
        raise UserError(f"{where}.json_path: {params.json_path!r} leads nowhere in {name}; check its keys and stars")
    return found

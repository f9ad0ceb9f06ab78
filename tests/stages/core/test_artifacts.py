from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core import artifacts
from stages.core.artifacts import (
    MANIFEST,
    digest,
    file_sha256,
    publish,
    read_json,
    recover,
    text_sha256,
    verify,
    write_json,
    write_manifest,
)
from stages.core.errors import UserError

REPOSITORY = Path(__file__).parents[3]
OLD = {"model.bin": b"old weights", "nested/config.json": b"{}", "gone.txt": b"only in the old one"}
NEW = {"model.bin": b"new weights, longer", "nested/config.json": b'{"a": 1}', "nested/deep/added.txt": b"new"}

names = st.text("abcxyz_-0.é", min_size=1, max_size=8).filter(lambda name: name not in (".", "..", MANIFEST))
files = st.dictionaries(st.lists(names, min_size=1, max_size=2).map("/".join), st.binary(max_size=64), max_size=5)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def build(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return build(tmp_path / "unit", OLD)


@pytest.fixture(params=["exchange", "fallback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How two folders change places: in one step, or with two renames where the system has no such step."""
    if request.param == "fallback":
        monkeypatch.setattr(artifacts, "_exchange", lambda one, other: False)
    return str(request.param)


def test_known_sums(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == text_sha256("abc") == known


def test_an_untouched_unit_passes(unit: Path) -> None:
    verify(unit)
    assert digest(unit) == file_sha256(unit / MANIFEST)


def test_a_manifest_inside_is_a_file_like_any_other(tmp_path: Path) -> None:
    build(tmp_path / "out/model", OLD)
    build(tmp_path / "out", {"metrics.json": b"{}"})
    (tmp_path / "out/model" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"out/model/manifest\.json: has 2 bytes"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda unit: (unit / "model.bin").write_bytes(b"OLD weights"), "unit/model.bin: was altered, its SHA-256"),
        (lambda unit: (unit / "model.bin").write_bytes(b"old weight"), "unit/model.bin: has 10 bytes where manifest"),
        (lambda unit: (unit / "model.bin").write_bytes(b""), "unit/model.bin: has 0 bytes"),
        (lambda unit: (unit / "nested/config.json").unlink(), "unit/nested/config.json: is missing"),
        (lambda unit: (unit / "model.bin").rename(unit / "m.bin"), "unit/model.bin: is missing"),
        (lambda unit: (unit / "nested/new.py").write_text("x"), "unit/nested/new.py: is not in manifest.json"),
        (lambda unit: (unit / MANIFEST).unlink(), "unit: has no manifest.json"),
        (lambda unit: (unit / MANIFEST).write_text("{"), "unit/manifest.json: is not valid JSON"),
        (lambda unit: (unit / MANIFEST).write_text("[]"), "unit/manifest.json: is not a manifest"),
        (lambda unit: (unit / MANIFEST).write_text('{"files": 3}'), "unit/manifest.json: is not a manifest"),
        (lambda unit: (unit / MANIFEST).write_text('{"files": {"a": {}}}'), "unit/manifest.json: is not a manifest"),
        (lambda unit: shutil.rmtree(unit), "unit: no such folder"),
    ],
)
def test_each_kind_of_tampering_is_named(unit: Path, tamper: Any, message: str) -> None:
    tamper(unit)
    with pytest.raises(UserError) as caught:
        verify(unit)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(way_out in str(caught.value) for way_out in ("dvc", "name a folder"))


@settings(max_examples=30)
@given(files)
def test_whatever_is_written_verifies_and_publishes(content: dict[str, bytes]) -> None:
    kept = {name: data for name, data in content.items() if not any(f"{name}/" in other for other in content)}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        build(root / "staging", kept)
        before = digest(root / "staging")
        publish(root / "staging", root / "out/target")
        verify(root / "out/target")
        assert content_of(root / "out/target") == kept
        assert digest(root / "out/target") == before


@given(files.filter(bool), st.data())
def test_any_flipped_bit_is_found(content: dict[str, bytes], data: st.DataObject) -> None:
    kept = {name: body for name, body in content.items() if body and not any(f"{name}/" in other for other in content)}
    if not kept:
        return
    name = data.draw(st.sampled_from(sorted(kept)))
    index = data.draw(st.integers(0, len(kept[name]) * 8 - 1))
    altered = bytearray(kept[name])
    altered[index // 8] ^= 1 << index % 8
    with tempfile.TemporaryDirectory() as folder:
        unit = build(Path(folder), kept)
        (unit / name).write_bytes(altered)
        with pytest.raises(UserError, match="was altered"):
            verify(unit)


@given(plain)
def test_json_round_trip(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new/value.json"
        write_json(path, value)
        assert read_json(path) == value
        assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {"a": object()}])
def test_what_is_not_json_leaves_the_old_file_and_no_draft(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", value)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.json", "1\n")]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"{", "not valid JSON"), (b"\xff", "not va")]
)
def test_unreadable_json_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json")


def test_publishing_replaces_the_whole_folder(tmp_path: Path, way: str) -> None:
    target = build(tmp_path / "target", OLD)
    publish(build(tmp_path / "staging", NEW), target)
    verify(target)
    assert content_of(target) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_exchange_is_what_runs_on_linux(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges two names in one step")
    one, other = build(tmp_path / "one", OLD), build(tmp_path / "other", NEW)
    assert artifacts._exchange(one, other)
    assert content_of(one) == NEW
    assert content_of(other) == OLD


def test_an_exchange_that_fails_is_an_error_not_a_silent_fallback(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges two names in one step")
    with pytest.raises(FileNotFoundError):
        artifacts._exchange(build(tmp_path / "one", OLD), tmp_path / "absent")


KILLED_PUBLISH = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from stages.core import artifacts

fatal, way = int(sys.argv[1]), sys.argv[2]
calls = itertools.count(1)

def deadly(function):
    def call(*arguments, **options):
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

exchange = artifacts._exchange if way == "exchange" else lambda one, other: False
artifacts._exchange = deadly(exchange)
# Path.rename, Path.replace and shutil.rmtree end in these.
for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
shutil.rmtree = deadly(shutil.rmtree)
if way == "json":
    artifacts.write_json(Path("value.json"), {"new": list(range(1000))})
else:
    artifacts.publish(Path("staging"), Path("target"))
"""


def kills(folder: Path, way: str, prepare: Any) -> Iterator[int]:
    """Run the script again and again, killed at call 1, 2, 3, ... until it gets through; yield after every kill."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for fatal in range(1, 200):
        prepare()
        done = subprocess.run(
            [sys.executable, "-c", KILLED_PUBLISH, str(fatal), way], cwd=folder, env=environment, check=False
        )
        if done.returncode == 0:
            assert fatal > 1
            return
        assert done.returncode == -signal.SIGKILL
        yield fatal
    raise AssertionError("the script never ended")


@pytest.mark.parametrize("there_before", [True, False], ids=["replaces", "first"])
@pytest.mark.parametrize("way", ["exchange", "fallback"])
def test_killed_at_any_call_publish_leaves_the_whole_old_or_the_whole_new(
    tmp_path: Path, way: str, there_before: bool
) -> None:
    target = tmp_path / "target"

    def prepare() -> None:
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        if there_before:
            build(target, OLD)
        build(tmp_path / "staging", NEW)

    outcomes = []
    for _ in kills(tmp_path, way, prepare):
        recover(target)
        if target.exists():
            verify(target)
        outcomes.append(content_of(target) if target.exists() else None)
        # The next run gets through, whatever the killed one left behind.
        shutil.rmtree(tmp_path / "staging", ignore_errors=True)
        publish(build(tmp_path / "staging", NEW), target)
        verify(target)
        assert content_of(target) == NEW
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert all(outcome in (OLD if there_before else None, NEW) for outcome in outcomes)
    assert outcomes[0] == (OLD if there_before else None)
    assert outcomes[-1] == NEW
    assert len(outcomes) > 6


def test_killed_at_any_call_a_json_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for _ in kills(tmp_path, "json", lambda: write_json(path, {"old": 1})):
        assert read_json(path) in ({"old": 1}, {"new": list(range(1000))})


def test_publish_finishes_what_a_killed_one_left_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume states are published by code that has no reason to call `recover` first."""
    monkeypatch.setattr(artifacts, "_exchange", lambda one, other: False)
    target = build(tmp_path / "target", OLD)
    build(tmp_path / ".target.retired", OLD)
    publish(build(tmp_path / "staging", NEW), target)
    assert content_of(target) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_recover_never_touches_a_healthy_target(unit: Path) -> None:
    recover(unit)
    verify(unit)
    assert content_of(unit) == OLD

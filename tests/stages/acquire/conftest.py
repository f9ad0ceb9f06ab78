"""What the tests of acquire share: small packages, a way to run the stage, and a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from stages.acquire.__main__ import run_acquire
from stages.core.artifacts import file_sha256, read_json
from stages.core.observe.tracking import RunRecord
from stages.core.params import parse_params
from stages.core.stage import StageRun

PRESET = Path(__file__).parents[3] / "presets" / "tiny.yaml"
ROWS = [
    (f"question {number} about {word}", label) for label, word in (("x", "cats"), ("y", "dogs")) for number in range(10)
]
Acquire = Callable[..., tuple[dict[str, Any], Path]]


def table_bytes(rows: list[tuple[str, str]] = ROWS, delimiter: str = ",") -> bytes:
    return "".join(f"{text}{delimiter}{label}\n" for text, label in [("text", "label"), *rows]).encode()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder to work in, whose packages are cached in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HEADROOM_PACKAGE_CACHE", str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()
    return folder


def project_params(**changes: Any) -> dict[str, Any]:
    """The tiny preset's params with a small `data.csv`, no corpus and no lexicon, and changes to `acquire`."""
    raw = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    raw["acquire"]["data"].update(source={"kind": "local", "path": "data.csv"}, format=None)
    raw["acquire"].update(corpus=[], lexicon=None)
    raw["robustness"]["perturbations"]["synonyms"] = 0.0
    for name, change in changes.items():
        own = raw["acquire"][name]
        merges = isinstance(own, dict) and isinstance(change, dict) and name != "checkpoint"
        raw["acquire"][name] = {**own, **change} if merges else change
        if name == "checkpoint" and change["kind"] != "scratch":
            raw["tokenize"]["tokenizer"] = {"kind": "checkpoint"}
    return raw


@pytest.fixture
def acquire(project: Path) -> Acquire:
    """Run the stage's work on `data.csv`, made if missing, with changes to `acquire`; return metrics and output."""

    def run(**changes: Any) -> tuple[dict[str, Any], Path]:
        if not (project / "data.csv").exists():
            (project / "data.csv").write_bytes(table_bytes())
        staging = project / "out"
        staging.mkdir()
        record = RunRecord(project / "record", {}, "")
        params = parse_params(project_params(**changes), "params.yaml")
        metrics = run_acquire(StageRun("acquire", params, {}, staging, project / "state", record))
        return metrics, staging

    return run


def make_wheel(folder: Path, files: dict[str, bytes], name: str = "demo_texts", version: str = "1.0") -> dict[str, str]:
    """Write a wheel; return what params say of it, but the member."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    described = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as pack:
        for member, body in {**files, **described}.items():
            pack.writestr(member, body)
    return {"kind": "wheel", "package": name, "version": version, "sha256": file_sha256(path)}


def make_sdist(folder: Path, files: dict[str, bytes], name: str = "demo-texts", version: str = "1.0") -> dict[str, str]:
    """Write a source distribution; return what params say of it, but the member."""
    path = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as ball:
        for member, body in files.items():
            info = tarfile.TarInfo(member if member.startswith(("/", "..")) else f"{name}-{version}/{member}")
            info.size = len(body)
            ball.addfile(info, BytesIO(body))
    return {"kind": "wheel", "package": name, "version": version, "sha256": file_sha256(path)}


@pytest.fixture
def packages(project: Path) -> Path:
    """The cache of packages."""
    return project.parent / "packages"


@pytest.fixture
def helpers() -> dict[str, Callable[..., Any]]:
    """Functions of this file, which test files cannot import."""
    return {
        "table_bytes": table_bytes,
        "make_wheel": make_wheel,
        "make_sdist": make_sdist,
        "provenance": lambda out: read_json(out / "provenance.json"),
        "params": project_params,
        "serve": serve,
    }


COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repositories = dict[str, dict[str, bytes]]
"""Files by name, by repository: `models/owner/name` or `datasets/owner/name`."""


@contextmanager
def serve(repositories: Repositories, asked: list[str]) -> Iterator[str]:
    """Serve repositories; yield the address. The files asked for are added to `asked`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(form)["paths"] if form.startswith("{") else [
                unquote(part.partition("=")[2]) for part in form.split("&") if part.startswith("paths=")
            ]  # fmt: skip
            _, key, rest = self._target()
            files = repositories.get(key, {})
            self._json([entry for entry in tree(files) if entry["path"] in wanted] if rest[0] == "paths-info" else [])

        def do_GET(self) -> None:
            is_api, key, rest = self._target()
            files = repositories.get(key)
            if files is None:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif is_api and rest[:1] in ([], ["revision"]):
                names = [{"rfilename": name} for name in files]
                self._json(
                    {"id": key.partition("/")[2], "sha": COMMIT, "siblings": names, "tags": [], "private": False}
                )
            elif is_api and rest[0] == "tree":
                prefix = "/".join(rest[2:])
                self._json([entry for entry in tree(files) if entry["path"].startswith(prefix)])
            elif rest[:1] == ["resolve"] and "/".join(rest[2:]) in files:
                name = "/".join(rest[2:])
                asked.append(name)
                self._send(200, files[name], {"ETag": f'"{blob(files[name])}"', "X-Repo-Commit": COMMIT})
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def _target(self) -> tuple[bool, str, list[str]]:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[0] == "api"
            parts = parts[1:] if is_api else parts
            if parts[0] not in ("models", "datasets"):
                parts = ["models", *parts]
            return is_api, "/".join(parts[:3]), parts[3:]

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def tree(files: dict[str, bytes]) -> list[dict[str, object]]:
    folders = sorted({name.rpartition("/")[0] for name in files if "/" in name})
    entries: list[dict[str, object]] = [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
    ]
    return entries + [
        {"type": "file", "path": name, "size": len(body), "oid": blob(body)} for name, body in files.items()
    ]


def blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

"""How the tests of the report make a page of artifacts, and read it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from selectolax.lexbor import LexborHTMLParser as HTMLParser

from stages.core.artifacts import digest, write_json, write_manifest
from stages.core.ladder import CHAIN, VARIANTS
from stages.core.params import load_params
from stages.report.page import SECTIONS, render, settled
from stages.report.sources import read_ladder

REPOSITORY = Path(__file__).parents[3]
EXPORTED = (*CHAIN, "quantize_finetuned")


def inputs() -> dict[str, Path]:
    """Input folders of the report by role, below the working directory."""
    stages = ("acquire", "clean", "tokenize", "pretrain", *CHAIN, "latency_table", "quantize_finetuned", "cascade")
    folders = {name: Path("artifacts") / name for name in (*stages, "deploy_check", "review", "history")}
    folders |= {f"export@{name}": Path("artifacts/export") / name for name in EXPORTED}
    return folders | {f"evaluate@{name}": Path("artifacts/evaluate") / name for name in VARIANTS}


def page_of(*names: str) -> str:
    """The page of the artifacts below the working directory; with names, of these sections only."""
    params, given = load_params(Path("params.yaml")), inputs()
    chosen = [name for name in SECTIONS if name in (names or SECTIONS)]
    found = [import_module(f"stages.report.sections.{name}").section(given, params) for name in chosen]
    sections = [section for section in found if section is not None]
    settled(sections)
    return render(read_ladder(given), sections, params)


def change_metrics(folder: Path, **changes: Any) -> None:
    """Replace top-level parts of a stage's metrics."""
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", metrics | changes)


def seal(folder: Path, **inputs: Path) -> None:
    """Write what the stage contract adds to every output made from `inputs`, manifests last."""
    given = {role: digest(unit) for role, unit in inputs.items()}
    write_json(
        folder / "measured.json",
        {"inputs": given, "wall_seconds": 12.5, "peak_memory_mb": 820.0, "energy_joules": None},
    )
    for unit in (path for path in folder.iterdir() if path.is_dir()):
        write_manifest(unit)
    write_manifest(folder)


def words(html: HTMLParser, selector: str) -> str:
    """The text of all matching nodes, single spaces between words."""
    return " ".join(" ".join(node.text(separator=" ") for node in html.css(selector)).split())


def table_after(html: HTMLParser, caption: str) -> list[list[str]]:
    """The cells of the table with such a caption, row by row, the header first."""
    for table in html.css("table"):
        head = table.css_first("caption")
        if head is not None and caption in head.text():
            return [
                [" ".join(cell.text(separator=" ").split()) for cell in row.css("th, td")] for row in table.css("tr")
            ]
    raise AssertionError(f"no table {caption!r}")

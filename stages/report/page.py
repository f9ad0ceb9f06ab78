"""Fills the page: the sections in order, the verdict above them, one HTML file out."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from stages.core.ladder import TITLES, LadderRow, points, rate, times
from stages.core.params import Params
from stages.report.drawing import inline, settle, style
from stages.report.sections import Section
from stages.report.sources import Inputs
from stages.report.verdict import reach_verdict

SECTIONS = (
    "ladder",
    "pareto",
    "quality",
    "mistakes",
    "cost",
    "slices",
    "robustness",
    "explanations",
    "cascade",
    "quantization",
    "deployment",
    "training",
    "review",
    "progress",
    "data",
    "lineage",
    "environment",
    "reproduce",
)
"""Modules of `stages.report.sections` in the order of the page; those that find nothing to tell are left out."""

NARROW = "_narrow"
"""How the name of a picture ends that shows on a phone in the place of another."""
_FOLDER = Path(__file__).parent
_STAGE_TITLES = {
    **TITLES,
    "pretrain": "pretraining",
    "finetune": "fine-tuning",
    "distill": "distillation",
    "prune": "recovery after pruning",
}
_UNKNOWN = "–"
# A table in a box of its own scrolls sideways without the page; a box that a template wrote is written anew.
_TABLE = re.compile(r'(<div class="box"[^>]*>\s*)?(<table\b.*?</table>)(?(1)\s*</div>)', re.DOTALL)
_CAPTION = re.compile(r"<caption>(.*?)</caption>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


def read_sections(inputs: Inputs, params: Params) -> list[Section]:
    """Ask every module for its part of the page.

    Args:
        inputs: folders by role.
        params: of the whole pipeline.

    Raises:
        UserError: if a file that a section reads is missing or malformed.
    """
    found = [_section_function(name)(inputs, params) for name in SECTIONS]
    return [section for section in found if section is not None]


def settled(sections: Sequence[Section]) -> dict[str, Figure]:
    """Lay out the pictures of all sections; return them by name.

    Raises:
        ValueError: if two sections give one name to their pictures, or a picture is not described.
    """
    figures: dict[str, Figure] = {}
    for section in sections:
        if twice := sorted(figures.keys() & section.figures.keys()):
            raise ValueError(f"section {section.identifier}: another section has a picture {twice[0]}")
        if silent := sorted(section.figures.keys() - section.descriptions.keys()):
            raise ValueError(f"section {section.identifier}: no description of the picture {silent[0]}")
        figures |= section.figures
    with style("draw"):
        for figure in figures.values():
            settle(figure)
    return figures


def render(rows: Sequence[LadderRow], sections: Sequence[Section], params: Params) -> str:
    """Fill the page.

    Args:
        rows: of the ladder.
        sections: from `read_sections`, laid out by `settled`.
        params: of the whole pipeline.

    Returns:
        The HTML text, which needs no other file and no network.
    """
    environment = _environment()
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        experiment=params.tracking.experiment,
        verdict=reach_verdict(rows, params.quality.floor),
        alarms=[section for section in sections if section.alarm],
        sections=[(section, _body(environment, section)) for section in sections],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _section_function(name: str) -> Callable[[Inputs, Params], Section | None]:
    function: Callable[[Inputs, Params], Section | None] = import_module(f"stages.report.sections.{name}").section
    return function


def _body(environment: Environment, section: Section) -> Markup:
    """The section's template, filled; every table stands in a box that scrolls by itself."""
    pictures = {
        name: Markup(inline(figure, name, section.descriptions[name])) for name, figure in section.figures.items()
    }
    template = environment.get_template(f"sections/{section.identifier}.html")
    return Markup(_TABLE.sub(_boxed, template.render({**section.context, "pictures": pictures})))


def _boxed(found: re.Match[str]) -> str:
    table = found[2]
    caption = _CAPTION.search(table)
    name = _TAG.sub("", caption[1]).strip() if caption else "Table"
    name = name.replace('"', "&quot;")
    return f'<div class="box" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: f"{share:.1%}",
        points=points,
        times=times,
        number=_number,
        mib=lambda size: _UNKNOWN if size is None else f"{size / 2**20:,.1f}",
        millions=lambda count: _UNKNOWN if count is None else f"{count / 1e6:,.1f}",
        rate=rate,
        whole=lambda value: _UNKNOWN if value is None else f"{value:,.0f}",
        stage=lambda name: _STAGE_TITLES.get(name, name),
        title=lambda name: TITLES.get(name, name),
    )
    return environment


def _number(value: Any) -> str:
    """Write any plain value for people: thousands separated, four digits where there are decimals."""
    if value is None or value == "":
        return _UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)

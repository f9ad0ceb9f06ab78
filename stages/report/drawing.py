"""How every picture looks, and how it becomes a file or a part of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1c2430"
MUTED = "#5b6673"
GRID = "#dde3ea"
PAPER = "#ffffff"
ACCENT = "#1f5fa6"
SECOND = "#b4541a"
GOOD = "#1c7547"
BAD = "#b3261e"
WASH = "#f7e9e7"

# On the page these follow the reader's light or dark scheme; in files they stay as they are.
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--paper",
    ACCENT: "--accent",
    SECOND: "--second",
    GOOD: "--good",
    BAD: "--bad",
    WASH: "--wash",
}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}
_PIXELS_PER_INCH = 160
# A hundredth of a point is finer than any screen; what matplotlib writes beyond it is half of the page.
_COORDINATES = re.compile(r'(?<= d=")[^"]*|(?<= [xy]=")[^"]*')
_DECIMALS = re.compile(r"(\.\d\d)\d+")


@contextmanager
def style(name: str, text: str = "path") -> Iterator[None]:
    """Draw and save in the project's style; `name` salts the ids in the SVG, so that equal input gives equal files."""
    settings: Any = {**_STYLE, "svg.hashsalt": name, "svg.fonttype": text}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Open a figure of so many inches whose parts keep clear of each other."""
    return Figure(figsize=(width, height), layout="constrained")


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, rather than anew for every file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def bare(axes: Axes) -> None:
    """Leave out the frame and the tick marks of a chart whose rows carry labels."""
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `name.png` and `name.svg`: the same bytes for the same figure."""
    with style(name):
        figure.savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(folder / f"{name}.png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})


def inline(figure: Figure, name: str, description: str) -> str:
    """Return the figure as SVG to be put into a page: real text, the page's colours, ids of its own."""
    with style(name, text="none"):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name, description)


def _for_page(svg: str, name: str, description: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", body, count=1)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = _COORDINATES.sub(lambda found: _DECIMALS.sub(r"\1", found[0]), body)
    # Names the browser resolves to the page's own type; sizes and anchors stay.
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return body.replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")

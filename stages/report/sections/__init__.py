"""Parts of the page, one module each.

A module gives `section(inputs, params)`: what its part of the page says, or None where the stages it reads did not run.
Its template stands beside it and sees the names in `context`, and every picture as `pictures.<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    identifier: str
    """Anchor on the page, and the name of the template `sections/<identifier>.html`."""
    title: str
    summary: str
    """What it found in one sentence, plain text: the page's contents and its verdict quote it."""
    context: Mapping[str, Any]
    """Names that the template sees."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Pictures by name, unique over the page; also saved as files of the stage."""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """What each picture shows, in words."""
    alarm: bool = False
    """Whether the reader must see this before trusting the model: it is then named in the verdict."""

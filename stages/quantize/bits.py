"""How many bits the weights of int8 products may have on the CPU at hand."""

from __future__ import annotations

from typing import Literal

from stages.core.hardware import saturates_here

Bits = Literal[7, 8]


def needed_bits(wanted: Literal["auto"] | Bits) -> Bits:
    """Take what params say, and for `auto` 7 where 8 would saturate on this CPU."""
    if wanted != "auto":
        return wanted
    return 7 if saturates_here() else 8

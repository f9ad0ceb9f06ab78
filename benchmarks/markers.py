"""Pages in part written by hand and in part by a command, which writes between two markers."""

from __future__ import annotations

from stages.core.errors import UserError


def put_between(page: str, name: str, text: str, where: str) -> str:
    """Put a text between the markers `<!-- name -->` and `<!-- /name -->` of a page.

    Raises:
        UserError: if the page, called `where`, has not both markers, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{where}: needs the lines {begin} and {end}, between which what was measured is written")
    return f"{head}{begin}\n{text.strip()}\n{end}{tail}"

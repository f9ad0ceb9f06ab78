"""Repairs of a text: pure functions from a string to a better one."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

import ftfy
from selectolax.lexbor import LexborHTMLParser

from stages.core.params import CleanParams

Repair = tuple[str, Callable[[str], str]]
"""A rule's name and what it does."""

# Only what is broken: quotes, ligatures and full-width forms are typography, and the model will meet them in use.
_UNICODE = ftfy.TextFixerConfig(
    normalization="NFC",
    unescape_html=False,
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    remove_terminal_escapes=False,
    remove_control_chars=False,
)

_BLOCKS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "h1|h2|h3|h4|h5|h6|head|header|hr|html|img|input|li|main|nav|ol|option|p|pre|section|select|table|tbody|td|"
    "tfoot|th|thead|title|tr|ul|video"
)
_INLINE = (
    "a|abbr|acronym|b|bdi|bdo|big|button|cite|code|del|dfn|em|font|i|iframe|ins|kbd|label|link|mark|meta|noscript|q|"
    "s|samp|script|small|span|strike|strong|style|sub|sup|tt|u|var"
)
# Attributes must have values, so that "a <b and c> d" is not taken for a tag.
_ATTRIBUTES = r"""(?:\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=]+))*\s*/?"""
_TAG = re.compile(rf"</?(?:{_BLOCKS}|{_INLINE}){_ATTRIBUTES}>|<!--.*?-->|<!doctype[^<>]*>", re.I | re.S)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS}){_ATTRIBUTES}>", re.I)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

# Control and format characters but spacing, and but the joiners that Persian, Hindi and emoji are written with.
_CONTROL = re.compile(
    "\x1b\\[[0-9;]*[A-Za-z]|"
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def repairs(params: CleanParams) -> list[Repair]:
    """Return the repairs that the params ask for, in their order."""
    rules: list[Repair] = []
    if params.fix_unicode:
        rules.append(("unicode", fix_unicode))
    if params.strip_html:
        rules.append(("html", strip_html))
    return [*rules, ("control_characters", drop_control_characters), ("whitespace", collapse_whitespace)]


def repair(text: str, rules: Sequence[Repair], note: Callable[[str, str, str], None]) -> str:
    """Apply repairs one after the other; `note(rule, before, after)` hears of each that changed something."""
    if is_plain(text):
        rules = rules[-1:]
    for name, function in rules:
        after = function(text)
        if after != text:
            note(name, text, after)
            text = after
    return text


def is_plain(text: str) -> bool:
    """Tell whether only the spacing of a text can be wrong, which is true of most and told fast."""
    return text.isascii() and text.isprintable() and "<" not in text and "&" not in text


def fix_unicode(text: str) -> str:
    """Undo wrong decodings such as "cafÃ©", and compose characters (NFC)."""
    return text if text.isascii() else ftfy.fix_text(text, _UNICODE)


def strip_html(text: str) -> str:
    """Remove the tags of HTML and decode its entities; "a < b", "<3" and "<unk>" stay as they are."""
    if "<" not in text or not _TAG.search(text):
        return _decode_entities(text) if "&" in text else text
    spaced = _BLOCK_TAG.sub(lambda tag: f" {tag[0]} ", _escape_lone_brackets(text))
    tree = LexborHTMLParser(f"<body>{spaced}")
    tree.strip_tags(["script", "style"], recursive=True)
    return tree.body.text(deep=True, separator="") if tree.body else ""


def drop_control_characters(text: str) -> str:
    """Remove what is never seen: terminal colours, zero-width spaces, direction marks, byte order marks."""
    return _CONTROL.sub("", text)


def collapse_whitespace(text: str) -> str:
    """Make every run of spacing, line breaks included, one space, and none at the ends."""
    return " ".join(text.split())


def _escape_lone_brackets(text: str) -> str:
    """Keep the parser from taking a "<" that begins no tag for one."""
    pieces, end = [], 0
    for tag in _TAG.finditer(text):
        pieces += [text[end : tag.start()].replace("<", "&lt;"), tag[0]]
        end = tag.end()
    return "".join([*pieces, text[end:].replace("<", "&lt;")])


def _decode_entities(text: str) -> str:
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)

"""Text of others on our page: whatever is in it, it is seen, and it is text."""

from __future__ import annotations

import re
from html import escape

from markupsafe import Markup

LONGEST = 5000
"""characters of one text that a page shows; the run folder has the rest"""
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
for _kept in (0x09, 0x0A):
    del _PICTURES[_kept]
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SEPARATORS = (0x85, 0x2028, 0x2029)
_NAMED = {code: f"⟨U+{code:04X}⟩" for code in (*_DIRECTIONS, *_SEPARATORS)}
_UNSEEN = dict.fromkeys((*range(128, 133), *range(134, 160)), 65533)
_VISIBLE: dict[int, int | str] = {**_PICTURES, **_NAMED, **_UNSEEN}
_SURROGATES = re.compile("[\ud800-\udfff\ufffe\uffff]")


def visible(text: str, longest: int = LONGEST) -> str:
    """The text with a picture for every control character, and what turns the direction by name.

    No text of a run's can hide a part of itself, or reverse what stands beside it.
    """
    if len(text) > longest:
        more = len(text) - longest
        text = f"{text[:longest]} … ({more:,} characters more in the run folder)"
    return _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").translate(_VISIBLE))


def visible_value(value: object) -> object:
    """What a template shows of a value: markup of our own as it is, other text made visible."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def escaped(text: str) -> str:
    """Text for markup that is put together outside the templates."""
    return escape(visible(text))


_MARKS = re.compile(r"([\\`*~\[\]])|(?<![^\W_])_|_(?![^\W_])")
_BEGINS = re.compile(r"^(|\d{1,9}(?=[.)](?:\s|$)))([#+=.)]|-(?!\d))")


def markdown(text: str) -> str:
    """Text on one line of Markdown, in a table or not, that is read as it stands."""
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKS.sub(lambda mark: "\\" + mark[0], line).replace("|", "\\|")
    return _BEGINS.sub(r"\1\\\2", line)


def plain_text(value: object) -> object:
    """What a Markdown template shows of a value: Markdown of our own as it is, all else as text."""
    return markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def fenced(text: str) -> Markup:
    """A block of text for Markdown, in a fence that is longer than any in it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return Markup(f"{fence}\n{visible(text)}\n{fence}")


def unbroken(text: str) -> str:
    """A number stays on one line with its unit, and a range with its ends."""
    units = r"(?:s|ms|min|h|d|W|kWh|Wh|MB|GB|GiB|GHz|G|nat|nats|USD|J|TFLOP/s|tokens/s)\b|[%°]"
    text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)
    return re.sub(rf"(?<=\d) (?={units})", "\u00a0", text)

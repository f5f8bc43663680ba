"""Escaping of untrusted text for HTML, SVG and Markdown, with every character visible."""

import re
from html import escape

from markupsafe import Markup

LONGEST = 5000
"""Characters of one text on a page; the run folder has the rest."""
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_CONTROL_PICTURES[0x7F] = 0x2421
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SEPARATORS = (0x85, 0x2028, 0x2029)
_CODES = {code: f"⟨U+{code:04X}⟩" for code in (*_DIRECTIONS, *_SEPARATORS)}
_C1_CONTROLS = dict.fromkeys((*range(0x80, 0x85), *range(0x86, 0xA0)), 0xFFFD)
_VISIBLE: dict[int, int | str] = {**_CONTROL_PICTURES, **_CODES, **_C1_CONTROLS}
_SURROGATES = re.compile("[\ud800-\udfff\ufffe\uffff]")


def visible(text: str, longest: int = LONGEST) -> str:
    """Return the text, cut to `longest`, with symbols for its control characters.

    No text can hide a part of itself or reverse the text beside it.
    """
    if len(text) > longest:
        more = len(text) - longest
        text = f"{text[:longest]} … ({more:,} characters more in the run folder)"
    return _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").translate(_VISIBLE))


def printable(text: str) -> str:
    """Return the text on one line, safe to print in a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def escaped(text: str) -> str:
    """Escape text for markup that is built outside the templates."""
    return escape(visible(text))


_MARKS = re.compile(r"([\\`*~\[\]])|(?<![^\W_])_|_(?![^\W_])")
_LINE_STARTS = re.compile(r"^(|\d{1,9}(?=[.)](?:\s|$)))([#+=.)]|-(?!\d))")


def markdown(text: str) -> str:
    """Escape text for one line of Markdown, inside a table or not; blank text becomes ␣."""
    line = " ".join(visible(text).split()) or ("␣" if text else "")
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKS.sub(lambda mark: "\\" + mark[0], line).replace("|", "\\|")
    return _LINE_STARTS.sub(r"\1\\\2", line)


def finalize_html(value: object) -> object:
    """Make a template's string visible; Jinja escapes it afterwards."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def finalize_markdown(value: object) -> object:
    """Escape a template's string for Markdown, except our own Markup."""
    return markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def fenced(text: str) -> Markup:
    """Return a Markdown code block whose fence is longer than any in the text."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return Markup(f"{fence}\n{visible(text)}\n{fence}")


def unbroken(text: str) -> str:
    """Join each number to its unit, and both ends of a range, by no-break characters."""
    units = r"(?:s|ms|min|h|d|W|kWh|Wh|MB|GB|GiB|GHz|G|nat|nats|USD|J|TFLOP/s|tokens/s)\b|[%°]"
    text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)
    return re.sub(rf"(?<=\d) (?={units})", "\u00a0", text)

"""Lines of an untrusted text file: limited in length, decoded, without control characters.

A log may hold gigabytes in one line, terminal colours, progress bars that overwrite themselves,
zeros written at a power failure, or the UTF-16 of a Windows shell's redirection.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.files import open_regular

LINE_CHARACTERS = 2**20
"""Longest line that is read; no training log needs a longer one."""
_QUOTED_CHARACTERS = 60
_PREFIXES = 8
"""Largest number of timestamps, levels and labels that are removed from one line."""

_ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles, links
    r"|\x1b[@-Z\\^_]"
)
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")
_PREFIX = re.compile(
    r"\s*(?:"
    r"\d{4}[-/]\d\d[-/]\d\d[T ,]+\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"
    r"|\d\d:\d\d:\d\d(?:[.,]\d+)?"
    r"|[A-Z][a-z]{2} +\d\d? \d\d:\d\d:\d\d [\w.-]+ [\w.-]+\[\d+\]:"
    r"|\[[^\]\[]{1,60}\]:?"
    r"|(?:DEBUG|INFO|WARNING|ERROR)\b(?::\w+:)?"
    r"|rank ?\d+:"
    r"|[-:|](?=\s)"
    r")\s*"
)


class TextLines:
    """The lines of a file with their numbers from 1, without line ends.

    A line ends with LF, CR LF or CR. Undecodable bytes become replacement characters.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self.too_long: list[int] = []
        """Numbers of the lines that were skipped for their length."""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        number, line = 1, ""
        for text in chain(self._decoded(), "\n"):
            rest_of_line, *next_lines = text.split("\n")
            if len(line) <= LINE_CHARACTERS:
                line += rest_of_line
            for next_line in next_lines:
                if len(line) <= LINE_CHARACTERS:
                    yield number, line
                else:
                    self.too_long.append(number)
                number, line = number + 1, next_line

    def _decoded(self) -> Iterator[str]:
        """Yield the text in pieces, every line end as LF."""
        try:
            with open_regular(self._path) as file:
                utf_16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                encoding = codecs.getincrementaldecoder("utf-16" if utf_16 else "utf-8-sig")
                decoder = io.IncrementalNewlineDecoder(encoding("replace"), translate=True)
                while data := file.read(2**16):
                    yield decoder.decode(data)
                yield decoder.decode(b"", final=True)
        except FileNotFoundError:
            raise BadInput(
                f"there is no log {self._path}; give the file with {self._what}."
            ) from None
        except OSError as error:
            raise BadInput(f"cannot read the log {self._path}: {error.strerror}.") from None


def strip_controls(line: str) -> str:
    """Remove terminal escapes and replace other control characters by spaces."""
    if not line.isprintable():
        line = _ESCAPE.sub("", line).translate(_CONTROLS)
    return line.strip()


def strip_prefixes(line: str) -> str:
    """Remove timestamps, log levels and process labels from the start of a line."""
    begin = 0
    for _ in range(_PREFIXES):
        match = _PREFIX.match(line, begin)
        if match is None:
            break
        begin = match.end()
    return line[begin:]


def quoted(text: str) -> str:
    """Return an untrusted text quoted, escaped and shortened, for a message."""
    if len(text) > _QUOTED_CHARACTERS:
        text = text[:_QUOTED_CHARACTERS] + "..."
    return repr(text)

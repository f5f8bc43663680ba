"""Lines of a file that anybody may have written: bounded, decoded, without control characters.

A log may hold gigabytes in one line, a terminal's colours, progress bars that overwrite themselves,
zeros where a machine lost power, or the UTF-16 that a Windows shell redirects into. What comes out
are lines that can be matched and shown.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from nanogauge.errors import BadInput

LINE_CHARACTERS = 2**20
"""a longer line is no line of a training log, and is passed over"""
_SHOWN_CHARACTERS = 60
_PREFIXES = 8
"""pieces of which what a logger writes before a line may consist"""

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


def open_log(path: Path, what: str) -> BufferedReader:
    """Open a regular file to read.

    Raises:
        BadInput: if there is none, or it cannot be read; `what` says what to give.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is no regular file; give the file with {what}.")
        return path.open("rb")
    except FileNotFoundError:
        raise BadInput(f"there is no log {path}; give the file with {what}.") from None
    except OSError as error:
        raise BadInput(f"cannot read the log {path}: {error.strerror}.") from None


class TextLines:
    """The lines of a file with their numbers, without their ends.

    A line ends with LF, CR LF, or CR. Bytes that are no text become replacement characters.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self.too_long: list[int] = []
        """numbers of the lines that were passed over"""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        number = 1
        kept, size = [], 0
        for piece, ends in self._pieces():
            size += len(piece)
            if size <= LINE_CHARACTERS:
                kept.append(piece)
            if not ends:
                continue
            if size <= LINE_CHARACTERS:
                yield number, "".join(kept)
            else:
                self.too_long.append(number)
            number += 1
            kept, size = [], 0

    def _pieces(self) -> Iterator[tuple[str, bool]]:
        """Parts of lines, none longer than a read, each with whether its line ends after it."""
        after_return = False
        for text in self._decoded():
            rest = text
            if after_return and rest.startswith("\n"):
                rest = rest[1:]
            after_return = text.endswith("\r")
            whole = rest.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            yield from ((piece, True) for piece in whole[:-1])
            yield whole[-1], False
        yield "", True

    def _decoded(self) -> Iterator[str]:
        with open_log(self._path, self._what) as file:
            begin = file.read(3)
            file.seek(0)
            wide = begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")("replace")
            try:
                while data := file.read(2**16):
                    yield decoder.decode(data)
            except OSError as error:
                raise BadInput(f"cannot read the log {self._path}: {error.strerror}.") from None
            yield decoder.decode(b"", final=True)


def plain(line: str) -> str:
    """A line without colours, and with a space for every other control character."""
    if "\x1b" in line:
        line = _ESCAPE.sub("", line)
    return line.translate(_CONTROLS).strip()


def without_prefix(line: str) -> str:
    """A line without the time, level and process that a logger or a shell wrote before it."""
    begin = 0
    for _ in range(_PREFIXES):
        if match := _PREFIX.match(line, begin):
            begin = match.end()
    return line[begin:]


def shown(text: str) -> str:
    """A piece of somebody else's text for a sentence of ours: quoted, escaped and short."""
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS] + "..."
    return repr(text)

"""Lines of an untrusted text file: limited in length, decoded, without control characters.

A log may hold gigabytes in one line, terminal colours, progress bars that overwrite themselves, zeros written at a
power failure, or the UTF-16 of a Windows shell's redirection.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.files import open_regular
from nanogauge.importers.formats import PREFIXES

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
_PREFIX = re.compile(rf"\s*(?:{'|'.join(PREFIXES)})\s*")


class TextLines:
    """The lines of a file with the numbers that an editor shows, without line ends.

    A line ends with LF or CR LF. A CR within a line, as progress bars print it, begins a new piece of the same number;
    in a file without LF it ends the line. The lines of a notebook are those of its cells' outputs. Undecodable bytes
    become replacement characters.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self.too_long: list[int] = []
        """Numbers of the lines that were skipped for their length."""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        pieces = self._pieces()
        number, first = next(pieces, (1, ""))
        if first.strip() == "{" or first.startswith('{"cells"'):
            yield from _notebook([(number, first), *pieces])
        else:
            yield number, first
            yield from pieces

    def _pieces(self) -> Iterator[tuple[int, str]]:
        number, line, counted = 1, "", "\n"
        for text in chain(self._decoded(), "\n"):
            rest_of_line, *more = re.split("(\r\n|\n|\r)", text)
            if len(line) <= LINE_CHARACTERS:
                line += rest_of_line
            if number == 1 and "\r" in more and not any("\n" in end for end in more[:-1]):
                counted = "\r"
            for end, next_line in zip(more[::2], more[1::2], strict=True):
                if len(line) > LINE_CHARACTERS:
                    self.too_long.append(number)
                elif line or end != "\r":
                    yield number, line
                number, line = number + (counted in end), next_line

    def _decoded(self) -> Iterator[str]:
        """Yield the text in pieces, none of which ends within a CR LF."""
        try:
            with open_regular(self._path) as file:
                decoder = codecs.getincrementaldecoder(_encoding(file.peek(2**12)))("replace")
                held = ""
                while data := file.read(2**16):
                    text = held + decoder.decode(data)
                    held = "\r" * text.endswith("\r")
                    yield text[: len(text) - len(held)]
                yield held + decoder.decode(b"", final=True)
        except FileNotFoundError:
            raise BadInput(f"there is no log {self._path}; give the file with {self._what}.") from None
        except OSError as error:
            raise BadInput(f"cannot read the log {self._path}: {error.strerror}.") from None


def _encoding(head: bytes) -> str:
    """Return the encoding of a text by its mark, or by where its zeros stand."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    for name, begin in (("utf-16-le", 1), ("utf-16-be", 0)):
        high, low = head[begin : 2**12 : 2], head[1 - begin : 2**12 : 2]
        if len(head) > 1 and high.count(0) > 0.7 * len(high) and low.count(0) < 0.1 * len(low):
            return name
    return "utf-8-sig"


def _notebook(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the numbered output lines of a notebook, or the lines of any other text unchanged."""
    try:
        cells = json.loads("\n".join(line for _, line in lines))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        texts = [o.get("text") or o.get("data", {}).get("text/plain", []) for o in outputs]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return lines
    places = {line.strip().rstrip(","): number for number, line in reversed(lines)}
    found: list[tuple[int, str]] = []
    for part in chain.from_iterable([t] if isinstance(t, str) else t for t in texts):
        number = places.get(json.dumps(part)) or places.get(json.dumps(part, ensure_ascii=False), 1)
        found += [(number, piece) for piece in re.split("[\r\n]+", str(part)) if piece]
    return found


def strip_controls(line: str) -> str:
    """Remove terminal escapes and replace other control characters by spaces."""
    if not line.isprintable():
        line = _ESCAPE.sub("", line).translate(_CONTROLS)
    if line.startswith('{"log":'):  # docker's json-file driver
        try:
            return str(json.loads(line)["log"]).strip()
        except (ValueError, LookupError, RecursionError):
            pass
    return line.strip()


def strip_prefixes(line: str) -> str:
    """Remove timestamps, log levels, process labels and echoed keys from the start of a line."""
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

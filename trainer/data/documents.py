"""Read the documents of a source file in bounded memory.

The name of a file gives its format: .parquet, .jsonl, .ndjson, .json (one JSON object per line) or .txt; all but
.parquet may also be compressed as .gz or .zst.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal, cast

from nanogauge.errors import BadInput
from trainer.data.hub import HUB, Damaged

FileFormat = Literal["parquet", "lines", "text"]
SEPARATOR = "<|endoftext|>"
"""Separates the documents of a .txt file."""
FORMATS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst")
_CHUNK_CHARACTERS = 2**24


@dataclass(frozen=True)
class Unit:
    """A piece of a source file for one worker: the division depends on file and unit_bytes only."""

    file: int
    """Index of the source file."""
    index: int
    """Index of this unit in its file."""
    name: str
    """Name of the source file."""
    path: str
    """Local path, or hf:// URL."""
    begin: int
    """First row group of a Parquet file, or first byte of any other file."""
    end: int
    """Row group or byte at which the unit ends, exclusive."""
    text_bytes: int
    """Approximate bytes of text in the unit."""

    @property
    def remote(self) -> bool:
        return self.path.startswith(HUB)


def format_of(name: str) -> tuple[FileFormat, str | None]:
    """Return the format and compression of a file from its name; raise BadInput if unknown."""
    bare, compression = name, None
    if name.endswith(COMPRESSIONS):
        bare, _, compression = name.rpartition(".")
    form = next((form for suffix, form in FORMATS.items() if bare.endswith(suffix)), None)
    if form is None or (form == "parquet" and compression):
        raise BadInput(
            f"{name} has no supported format: {', '.join(FORMATS)}; all but .parquet may also be "
            "compressed as .gz or .zst."
        )
    return form, compression


def read_documents(unit: Unit, column: str) -> Iterator[str]:
    """Yield the documents of a unit, skipping table rows and lines without text.

    Raises:
        Damaged: if the file cannot be read to its end.
        BadInput: if the file has no text in `column`.
    """
    form, compression = format_of(unit.name)
    texts: Iterator[str | None]
    try:
        if form == "parquet":
            from trainer.data.parquet import open_parquet, read_row_groups

            file, groups = open_parquet(unit.path, unit.name), range(unit.begin, unit.end)
            texts = read_row_groups(file, groups, column, unit.text_bytes)
        elif form == "lines":
            texts = _read_lines(unit, column, compression)
        else:
            texts = _read_text(unit, compression)
        yield from filter(None, texts)
    except _damage_errors(form, compression) as error:
        first = str(error).partition("\n")[0]
        if isinstance(error, UnicodeDecodeError) and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise BadInput(f"{unit.name} is UTF-16; save it as UTF-8.") from None
        raise Damaged(f"{unit.name} is damaged or cannot be read ({first}).") from error


def _damage_errors(form: FileFormat, compression: str | None) -> tuple[type[Exception], ...]:
    errors = (EOFError, OSError, UnicodeDecodeError, zlib.error)
    if form != "parquet" and compression != "zst":
        return errors  # importing Arrow takes a while
    import pyarrow as pa

    return *errors, pa.ArrowException


def _open(unit: Unit, compression: str | None) -> IO[bytes]:
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(unit.path, "rb"))
    if compression == "zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(unit.path, compression="zstd"))
    return open(unit.path, "rb")


def _read_lines(unit: Unit, column: str, compression: str | None) -> Iterator[str | None]:
    """Yield the text of each JSON line that begins in a unit; the last may end beyond it."""
    with _open(unit, compression) as file:
        at = unit.begin
        if at:
            file.seek(at - 1)
            skipped = file.readline(unit.end - at + 1)
            if not skipped.endswith(b"\n"):
                return  # a line of an earlier unit covers this whole unit
            at += len(skipped) - 1
        while compression is not None or at < unit.end:
            line = file.readline()
            if not line:
                break
            yield _parse_line(line, column, unit.name, at)
            at += len(line)


def _parse_line(line: bytes, column: str, name: str, at: int) -> str | None:
    if line.isspace():
        return None
    try:
        row = json.loads(line)
    except ValueError:
        raise BadInput(f"{name} holds no JSON in the line at byte {at:,}.") from None
    if not isinstance(row, dict) or not isinstance(row.get(column, 0), str | None):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise BadInput(
            f"{name} has no text {column!r} in the line at byte {at:,}, only {keys[:200]}; give --text-column."
        )
    return cast("str | None", row[column])


def _read_text(unit: Unit, compression: str | None) -> Iterator[str]:
    """Yield the documents of a text file, without the newline after a separator."""
    with io.TextIOWrapper(_open(unit, compression), "utf-8-sig", newline="") as file:
        rest, begins = "", True
        while chunk := file.read(_CHUNK_CHARACTERS):
            *documents, rest = (rest + chunk).split(SEPARATOR)
            for document in documents:
                yield document if begins else document.removeprefix("\n")
                begins = False
        yield rest if begins else rest.removeprefix("\n")

"""The documents of one unit of a source file, one after another, in bounded memory.

What a file is, its name says: .parquet, .jsonl, .ndjson, .json (a JSON object on each line) or
.txt, the last two kinds also compressed as .gz or .zst.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from nanogauge.errors import BadInput

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from trainer.data.tokenizer import Text

TextKind = Literal["parquet", "lines", "text"]
SEPARATOR = "<|endoftext|>"
"""between the documents of a .txt file"""
LONG = 2**20
"""bytes beyond which a document is not made one string"""
HUGE = 2**25
"""bytes beyond which a document is for one worker at a time"""
_BATCH_BYTES = 2**22
_KINDS: dict[str, TextKind] = {
    ".parquet": "parquet",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".zst")


class Damaged(BadInput):
    """A file is not what its name says, or was damaged on its way: the next try may be whole."""


@dataclass(frozen=True)
class Unit:
    """What a worker reads at once. It depends on the file and on unit_bytes alone."""

    file: int
    """index of the source file"""
    index: int
    """of this unit in its file"""
    name: str
    """of the source file"""
    path: str
    """where it is: a local path, or an address"""
    size: int
    """bytes of the whole file"""
    remote: bool
    begin: int
    """first row group, or byte"""
    end: int
    """behind the last row group, or byte"""
    text_bytes: int
    """bytes of text, about"""

    @property
    def key(self) -> tuple[int, int]:
        return self.file, self.index


def kind_of(name: str) -> tuple[TextKind, str | None]:
    """What a file holds and how it is compressed, by its name.

    Raises:
        BadInput: if it is none of the kinds that can be read.
    """
    bare, compression = name, None
    if name.endswith(_COMPRESSED):
        bare, _, compression = name.rpartition(".")
    kind = next((kind for end, kind in _KINDS.items() if bare.endswith(end)), None)
    if kind is None or (kind == "parquet" and compression):
        raise BadInput(
            f"{name} is not of a kind that can be read: {', '.join(_KINDS)}, and but for .parquet "
            "also with .gz or .zst behind."
        )
    return kind, compression


def documents(
    unit: Unit, column: str, file: pq.ParquetFile | None, one_at_a_time: AbstractContextManager[Any]
) -> Iterator[Text]:
    """The documents of a unit; a row without text is no document.

    Args:
        unit: what to read.
        column: name of the column, or key, that holds the text.
        file: the open file, where it is a Parquet file.
        one_at_a_time: held while a huge document is in memory.

    Raises:
        Damaged: if the file cannot be read to its end.
        BadInput: if it holds no such texts.
    """
    kind, compression = kind_of(unit.name)
    try:
        if kind == "parquet":
            assert file is not None
            yield from _from_parquet(unit, column, file, one_at_a_time)
        elif kind == "lines":
            yield from _from_lines(unit, column, compression, one_at_a_time)
        else:
            yield from _from_text(unit, compression)
    except _damage(kind, compression) as error:
        first = str(error).partition("\n")[0]
        raise Damaged(f"{unit.name} is damaged or cannot be read ({first}).") from None


def _damage(kind: TextKind, compression: str | None) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    damage = (EOFError, OSError, UnicodeDecodeError, zlib.error)
    if kind != "parquet" and compression != "zst":
        return damage  # without the second that it takes to import Arrow
    import pyarrow as pa

    return *damage, pa.ArrowException


def _from_parquet(
    unit: Unit, column: str, file: pq.ParquetFile, one_at_a_time: AbstractContextManager[Any]
) -> Iterator[Text]:
    groups = range(unit.begin, unit.end)
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    size = max(1, min(1024, _BATCH_BYTES * rows // max(unit.text_bytes, 1)))
    batches = file.iter_batches(size, groups, [column], use_threads=False)
    if unit.text_bytes < HUGE:
        for batch in batches:
            yield from _texts_of(batch.column(0))
    else:
        with one_at_a_time:
            for batch in batches:
                yield from _texts_of(batch.column(0))


def _texts_of(texts: Any) -> Iterator[Text]:
    if texts.nbytes < LONG:
        yield from filter(None, texts.to_pylist())
        return
    for text in texts:
        if text.is_valid and (data := text.as_buffer()).size:
            yield str(text) if data.size < LONG else memoryview(data)


def _open(unit: Unit, compression: str | None) -> IO[bytes]:
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(unit.path, "rb"))
    if compression == "zst":
        import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

        return io.BufferedReader(pa.input_stream(unit.path, compression="zstd"))
    return open(unit.path, "rb")


def _from_lines(
    unit: Unit, column: str, compression: str | None, one_at_a_time: AbstractContextManager[Any]
) -> Iterator[Text]:
    """The lines that begin in a unit; the last one may end behind it."""
    with _open(unit, compression) as file:
        at = unit.begin
        if at:
            file.seek(at - 1)
            skipped = file.readline(unit.end - at + 1)
            if not skipped.endswith(b"\n"):
                return  # the line that began before goes on beyond this unit
            at += len(skipped) - 1
        while compression is not None or at < unit.end:
            line = file.readline()
            if not line:
                break
            if len(line) < HUGE:
                text = _text_of_line(line, column, unit.name, at)
                if text:
                    yield text
            else:
                with one_at_a_time:
                    if data := _text_of_huge_line(line, column, unit.name, at):
                        yield data
            at += len(line)


def _text_of_line(line: bytes, column: str, name: str, at: int) -> str | None:
    if line.isspace():
        return None
    try:
        row = json.loads(line)
    except ValueError:
        raise BadInput(f"{name} holds no JSON in the line at byte {at:,}.") from None
    if not isinstance(row, dict) or not isinstance(row.get(column, 0), str | None):
        held = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise BadInput(
            f"{name} has no text {column!r} in the line at byte {at:,}, only {held[:200]}; "
            "give --text-column."
        )
    return cast("str | None", row[column])


def _text_of_huge_line(line: bytes, column: str, name: str, at: int) -> memoryview:
    """The text of a line too long for Python's strings, of up to four bytes a character."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    try:
        table = arrow_json.read_json(
            pa.BufferReader(line),
            arrow_json.ReadOptions(use_threads=False, block_size=len(line) + 1),
            arrow_json.ParseOptions(
                explicit_schema=pa.schema([(column, pa.string())]),
                unexpected_field_behavior="ignore",
            ),
        )
        return memoryview(table[column][0].as_buffer() or b"")
    except pa.ArrowException as error:
        raise BadInput(f"{name} holds no JSON in the line at byte {at:,} ({error}).") from None


def _from_text(unit: Unit, compression: str | None) -> Iterator[Iterator[str]]:
    """The documents of a text file, each in chunks; each is to be read before the next."""
    with _open(unit, compression) as file:
        reader = _TextReader(file)
        while reader.begin_document():
            yield reader.chunks()


class _TextReader:
    """Takes a text apart at the separators, a chunk at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._held = ""
        self._at_end = False

    def _more(self) -> None:
        data = self._file.read(2**18)
        self._held += self._decoder.decode(data, final=not data)
        self._at_end = not data

    def begin_document(self) -> bool:
        """Skip separators and the line's end behind them; whether there is another document."""
        while True:
            while len(self._held) <= len(SEPARATOR) and not self._at_end:
                self._more()
            if self._held.startswith(SEPARATOR):
                self._held = self._held.removeprefix(SEPARATOR).removeprefix("\n")
            else:
                return bool(self._held)

    def chunks(self) -> Iterator[str]:
        while True:
            text, found, rest = self._held.partition(SEPARATOR)
            if found:
                self._held = found + rest
                yield text
                return
            # The last characters may be the beginning of a separator.
            keep = 0 if self._at_end else len(SEPARATOR)
            ready = text[: len(text) - keep] if keep else text
            self._held = text[len(ready) :]
            if ready:
                yield ready
            if self._at_end:
                return
            self._more()

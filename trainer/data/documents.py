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
from collections.abc import Callable, Iterable

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

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


_TAIL_BYTES = 2**16
_AT_ONCE_BYTES = 2**26
"""what is fetched of a unit before it is read; of a larger one a block at a time"""
_BLOCK_BYTES = 2**23
_BUFFER_BYTES = 2**20
_GAP_BYTES = 2**18

Fetch = Callable[[int, int], bytes]
"""bytes of a file from begin to end"""


class RangeFile(io.RawIOBase):
    """A file of which only what is read is fetched, and nothing twice that is in memory."""

    def __init__(self, fetch: Fetch, size: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._at = 0
        self._held: list[tuple[int, bytes]] = []

    def hold(self, begin: int, end: int) -> None:
        """Fetch a range now, and keep it."""
        if not any(start <= begin and end <= start + len(data) for start, data in self._held):
            self._held.append((begin, self._fetch(begin, end)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        begin, self._at = self._at, end
        for start, data in reversed(self._held):
            if start <= begin and end <= start + len(data):
                return data[begin - start : end - start]
        if end - begin > _BLOCK_BYTES:
            return self._fetch(begin, end)
        block = self._fetch(begin, min(begin + _BLOCK_BYTES, self._size))
        self._held[1:] = [(begin, block)]  # the footer stays
        return block[: end - begin]


def open_local(path: str) -> pq.ParquetFile:
    """Open a local file.

    Raises:
        Damaged: if it is no Parquet file.
    """
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _no_parquet(path, error) from None


_footers: dict[str, tuple[int, bytes]] = {}
"""that of the file which was opened last, by its address"""


def open_remote(unit: Unit, column: str) -> pq.ParquetFile:
    """Open a file on the hub, with the text of the unit's row groups in memory if it is not much.

    Raises:
        Damaged: if what came is no Parquet file.
        RunFailed: if it cannot be fetched.
    """
    file, opened = _open_range_file(unit.path, unit.name, unit.size)
    at = column_index(opened, column, unit.name)
    chunks = [opened.metadata.row_group(g).column(at) for g in range(unit.begin, unit.end)]
    if sum(chunk.total_compressed_size for chunk in chunks) <= _AT_ONCE_BYTES:
        for begin, end in _together(map(_place, chunks)):
            file.hold(begin, end)
    return opened


def _place(chunk: Any) -> tuple[int, int]:
    """Where the pages of a column chunk begin and end."""
    begin = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        begin = min(begin, chunk.dictionary_page_offset)
    return begin, begin + chunk.total_compressed_size


def _together(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that lie close together as one: a request costs more than the bytes between them."""
    joined: list[tuple[int, int]] = []
    for begin, end in places:
        if joined and begin - joined[-1][1] <= _GAP_BYTES:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def read_remote_footer(address: str, name: str, size: int) -> pq.ParquetFile:
    """Open a file on the hub for what its footer says; errors as of `open_remote`."""
    return _open_range_file(address, name, size)[1]


def _open_range_file(address: str, name: str, size: int) -> tuple[RangeFile, pq.ParquetFile]:
    from trainer.data.hub import fetch_range

    def fetch(begin: int, end: int) -> bytes:
        return fetch_range(address, name, begin, end, size)

    if address not in _footers:
        tail = fetch(max(size - _TAIL_BYTES, 0), size)
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or footer_bytes > size:
            raise Damaged(f"{name} is no Parquet file (its last bytes are not PAR1).")
        if footer_bytes > len(tail):
            tail = fetch(size - footer_bytes, size - len(tail)) + tail
        _footers.clear()
        _footers[address] = size - len(tail), tail
    file = RangeFile(fetch, size)
    file._held.append(_footers[address])
    try:
        return file, pq.ParquetFile(
            pa.PythonFile(file, "r"), buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        del _footers[address]
        raise _no_parquet(name, error) from None


def _no_parquet(name: str, error: Exception) -> Damaged:
    first = str(error).partition("\n")[0]
    return Damaged(f"{name} is no Parquet file, or is damaged ({first}).")


def column_index(file: pq.ParquetFile, column: str, name: str) -> int:
    """Which column chunk holds the text.

    Raises:
        BadInput: if there is no such column, or it holds no text.
    """
    schema = file.schema_arrow
    if column not in schema.names:
        raise BadInput(
            f"{name} has no column {column!r}, only {', '.join(schema.names)}; give --text-column."
        )
    kind: Any = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"the column {column!r} of {name} holds {kind}, not text.")
    return [file.schema.column(i).path for i in range(len(file.schema))].index(column)


def row_groups(
    file: pq.ParquetFile, column: str, name: str, unit_bytes: int
) -> list[tuple[int, int, int]]:
    """Runs of row groups with about unit_bytes of text: first, behind the last, bytes of text.

    Raises:
        BadInput: if there is no such column, or it holds no text.
    """
    at = column_index(file, column, name)
    runs: list[tuple[int, int, int]] = []
    begin, held = 0, 0
    for group in range(file.num_row_groups):
        held += file.metadata.row_group(group).column(at).total_uncompressed_size
        if held >= unit_bytes or group == file.num_row_groups - 1:
            runs.append((begin, group + 1, held))
            begin, held = group + 1, 0
    return runs

"""Parquet files, local or on the hub; of a remote one only the text that is read is fetched."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from nanogauge.errors import BadInput
from trainer.data.documents import Damaged, Unit

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

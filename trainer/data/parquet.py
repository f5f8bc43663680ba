"""Open Parquet files, local or on the hub; from the hub only the needed byte ranges are fetched."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanogauge.errors import BadInput
from trainer.data.documents import Damaged, Unit
from trainer.data.hub import fetch_range

_TAIL_BYTES = 2**16
_PREFETCH_BYTES = 2**26  # a larger unit is fetched block by block while it is read
_BLOCK_BYTES = 2**23
_BUFFER_BYTES = 2**20
_GAP_BYTES = 2**18

_footers: dict[str, tuple[int, bytes]] = {}
"""Position and bytes of the footer of the last opened file, by URL."""


class RangeFile(io.RawIOBase):
    """Seekable file that fetches byte ranges on demand and caches some of them."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        """`fetch` takes begin and end and returns the bytes in [begin, end); `size` is in bytes."""
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._at = 0
        self._cache: list[tuple[int, bytes]] = []

    def prefetch(self, begin: int, end: int) -> None:
        if not any(start <= begin and end <= start + len(data) for start, data in self._cache):
            self._cache.append((begin, self._fetch(begin, end)))

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
        for start, data in reversed(self._cache):
            if start <= begin and end <= start + len(data):
                return data[begin - start : end - start]
        if end - begin > _BLOCK_BYTES:
            return self._fetch(begin, end)
        block = self._fetch(begin, min(begin + _BLOCK_BYTES, self._size))
        self._cache[1:] = [(begin, block)]  # the footer stays
        return block[: end - begin]


def open_local(path: str) -> pq.ParquetFile:
    """Open a local file; raise Damaged if it is not a Parquet file."""
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None


def open_remote(unit: Unit, column: str) -> pq.ParquetFile:
    """Open a file on the hub; prefetch the unit's text column if it is small.

    Raises:
        Damaged: if the received bytes are not a Parquet file.
        RunFailed: if it cannot be fetched.
    """
    file, opened = open_range_file(unit.path, unit.name, unit.size)
    index = column_index(opened, column, unit.name)
    chunks = [opened.metadata.row_group(g).column(index) for g in range(unit.begin, unit.end)]
    if sum(chunk.total_compressed_size for chunk in chunks) <= _PREFETCH_BYTES:
        for begin, end in _merge_ranges(map(_byte_range, chunks)):
            file.prefetch(begin, end)
    return opened


def _byte_range(chunk: Any) -> tuple[int, int]:
    """Return the first and last byte of a column chunk's pages."""
    begin = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        begin = min(begin, chunk.dictionary_page_offset)
    return begin, begin + chunk.total_compressed_size


def _merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge byte ranges with small gaps, as fetching a gap is faster than another request."""
    merged: list[tuple[int, int]] = []
    for begin, end in ranges:
        if merged and begin - merged[-1][1] <= _GAP_BYTES:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((begin, end))
    return merged


def open_range_file(url: str, name: str, size: int) -> tuple[RangeFile, pq.ParquetFile]:
    """Open a file on the hub and fetch its metadata; raises as `open_remote`."""

    def fetch(begin: int, end: int) -> bytes:
        return fetch_range(url, name, begin, end, size)

    if url not in _footers:
        tail = fetch(max(size - _TAIL_BYTES, 0), size)
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or footer_bytes > size:
            raise Damaged(f"{name} is not a Parquet file (its last bytes are not PAR1).")
        if footer_bytes > len(tail):
            tail = fetch(size - footer_bytes, size - len(tail)) + tail
        _footers.clear()
        _footers[url] = size - len(tail), tail
    file = RangeFile(fetch, size)
    file._cache.append(_footers[url])
    try:
        return file, pq.ParquetFile(
            pa.PythonFile(file, "r"), buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        del _footers[url]
        raise _not_parquet(name, error) from None


def _not_parquet(name: str, error: Exception) -> Damaged:
    first = str(error).partition("\n")[0]
    return Damaged(f"{name} is not a Parquet file, or is damaged ({first}).")


def column_index(file: pq.ParquetFile, column: str, name: str) -> int:
    """Return the index of the text column in each row group's list of column chunks.

    Raises:
        BadInput: if the column is missing or does not hold text.
    """
    schema = file.schema_arrow
    if column not in schema.names:
        raise BadInput(f"{name} has no column {column!r}, only {', '.join(schema.names)}; give --text-column.")
    kind: Any = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"the column {column!r} of {name} holds {kind}, not text.")
    return [file.schema.column(i).path for i in range(len(file.schema))].index(column)


def split_row_groups(file: pq.ParquetFile, column: str, name: str, unit_bytes: int) -> list[tuple[int, int, int]]:
    """Divide a file into units: consecutive row groups with about unit_bytes of text.

    Returns for each unit its first row group, the one after its last, and its bytes of text.

    Raises:
        BadInput: as `column_index`.
    """
    index = column_index(file, column, name)
    units: list[tuple[int, int, int]] = []
    begin, size = 0, 0
    for group in range(file.num_row_groups):
        size += file.metadata.row_group(group).column(index).total_uncompressed_size
        if size >= unit_bytes or group == file.num_row_groups - 1:
            units.append((begin, group + 1, size))
            begin, size = group + 1, 0
    return units

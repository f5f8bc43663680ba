"""Open Parquet files, local or on the hub; from the hub only the needed byte ranges are fetched."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanogauge.errors import BadInput
from trainer.data.hub import HUB, Damaged, silence_client

_BUFFER_BYTES = 2**23
"""Bytes read, and fetched with one request, at a time."""
_BATCH_BYTES = 2**22


def open_parquet(path: str, name: str) -> pq.ParquetFile:
    """Open a Parquet file at a local path or an hf:// URL; raise Damaged if it is none, or cannot be read."""
    try:
        return _open_remote(path) if path.startswith(HUB) else _open(path)
    except (OSError, pa.ArrowException) as error:
        first = str(error).partition("\n")[0]
        raise Damaged(f"{name} is not a Parquet file, or is damaged ({first}).") from error


def _open(source: Any) -> pq.ParquetFile:
    return pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)


@lru_cache(maxsize=1)  # keeps the metadata, of up to a MB, for the units of a file
def _open_remote(url: str) -> pq.ParquetFile:
    silence_client()
    from huggingface_hub import HfFileSystem

    return _open(HfFileSystem().open(url, cache_type="none"))


def read_row_groups(file: pq.ParquetFile, groups: range, column: str, text_bytes: int) -> Iterator[str | None]:
    """Yield the text of each row, in batches of a few MB; `text_bytes` is that of all the row groups."""
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    size = max(1, min(1024, _BATCH_BYTES * rows // max(text_bytes, 1)))
    for batch in file.iter_batches(size, groups, [column], use_threads=False):
        yield from batch.column(0).to_pylist()


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

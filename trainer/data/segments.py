"""Segments: the tokens of one unit, which a worker leaves on disk for the shards.

A segment file holds the tokens, then the length of each document, then a footer with the counts
and a CRC-32 of the tokens.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from trainer.data.manifest import TokenDtype, Tokens
from trainer.data.tokenizer import Encoded

SUFFIX = ".segment"
_FOOTER = struct.Struct("<8sQQQI")
_MAGIC = b"ngpiece1"
_BUFFER_TOKENS = 2**17
_BLOCK_BYTES = 2**22


def segment_path(folder: Path, file: int, unit: int) -> Path:
    return folder / f"{file:05d}_{unit:07d}{SUFFIX}"


class SegmentWriter:
    """Writes one segment under a temporary name, which `finish` renames."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._buffer = cast(Tokens, np.empty(_BUFFER_TOKENS, dtype))
        self._buffered = 0
        self._crc = 0
        self._lengths: list[npt.NDArray[np.int64]] = []
        self.tokens = 0
        self.text_bytes = 0
        """UTF-8 bytes of the documents, counted by the caller."""

    def add_documents(self, tokens: Encoded, end_of_text: int) -> None:
        """Add whole documents; each begins with the end-of-text token, which occurs only there."""
        starts = np.flatnonzero(tokens == end_of_text)
        assert starts.size and starts[0] == 0
        self._lengths.append(np.diff(starts, append=tokens.size))
        self._append(tokens)

    def extend_document(self, tokens: Encoded) -> None:
        """Append tokens to the last document."""
        self._lengths[-1][-1] += tokens.size
        self._append(tokens)

    def _append(self, tokens: Encoded) -> None:
        self.tokens += tokens.size
        while tokens.size:
            part = tokens[: _BUFFER_TOKENS - self._buffered]
            self._buffer[self._buffered : self._buffered + part.size] = part
            self._buffered += part.size
            tokens = tokens[part.size :]
            if self._buffered == _BUFFER_TOKENS:
                self._flush()

    def _flush(self) -> None:
        data = self._buffer[: self._buffered].data
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)
        self._buffered = 0

    def finish(self) -> None:
        with self._file as file:
            self._flush()
            lengths = np.concatenate((*self._lengths, np.zeros(0, np.int64))).astype("<i8")
            file.write(lengths.data)
            file.write(_FOOTER.pack(_MAGIC, self.tokens, lengths.size, self.text_bytes, self._crc))
        self._temporary.replace(self._path)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Segment:
    path: Path
    dtype: TokenDtype
    tokens: int
    text_bytes: int
    starts: npt.NDArray[np.int64]
    """First token of each document, then the number of tokens."""

    @property
    def documents(self) -> int:
        return self.starts.size - 1

    def read(self, file: BinaryIO, begin: int, end: int) -> Tokens:
        """Return the tokens from begin to end; `file` is the segment's open file."""
        file.seek(begin * self.dtype.itemsize)
        data = file.read((end - begin) * self.dtype.itemsize)
        return cast(Tokens, np.frombuffer(data, self.dtype))


def open_segment(path: Path, dtype: TokenDtype) -> Segment:
    """Open a segment without checking its CRC."""
    with path.open("rb") as file:
        tokens, text_bytes, _, lengths = _read_footer(file, dtype)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Segment(path, dtype, tokens, text_bytes, starts)


def is_intact(path: Path, dtype: TokenDtype) -> bool:
    """Return True if a segment of an earlier run exists and its CRC is right."""
    try:
        with path.open("rb") as file:
            tokens, _, expected, _ = _read_footer(file, dtype)
            file.seek(0)
            left, crc = tokens * dtype.itemsize, 0
            while left:
                data = file.read(min(left, _BLOCK_BYTES))
                crc = zlib.crc32(data, crc)
                left -= len(data)
    except (OSError, ValueError):
        return False
    return crc == expected


def _read_footer(file: BinaryIO, dtype: TokenDtype) -> tuple[int, int, int, npt.NDArray[np.int64]]:
    """Return tokens, bytes of text, CRC and document lengths."""
    size = file.seek(0, os.SEEK_END)
    if size < _FOOTER.size:
        raise ValueError("no footer")
    file.seek(size - _FOOTER.size)
    magic, tokens, documents, text_bytes, crc = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != _MAGIC or size != tokens * dtype.itemsize + documents * 8 + _FOOTER.size:
        raise ValueError("no footer")
    file.seek(tokens * dtype.itemsize)
    lengths = np.frombuffer(file.read(documents * 8), "<i8")
    if lengths.sum() != tokens:
        raise ValueError("document lengths do not add up")
    return tokens, text_bytes, crc, lengths

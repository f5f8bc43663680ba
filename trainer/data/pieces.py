"""Pieces: the tokens of one unit of the source, as a worker leaves them on disk for the shards.

A piece is its tokens, then the length of each document (int64), then a footer with the counts and
the CRC-32 of the tokens. It is written aside and renamed, so one that is there is whole, unless
the machine lost its power: then its checksum does not fit, and the unit is done again.
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

_FOOTER = struct.Struct("<8sQQQI")
_MAGIC = b"ngpiece1"
_BUFFER_TOKENS = 2**17
_BLOCK_BYTES = 2**22

TokenDtype = np.dtype[np.uint16] | np.dtype[np.uint32]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def dtype_of(vocab_size: int) -> TokenDtype:
    """How the tokens of a vocabulary lie on disk: in two bytes where they can."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def piece_path(folder: Path, file: int, unit: int) -> Path:
    """Where the piece of a unit is, or will be."""
    return folder / f"{file:05d}_{unit:07d}.piece"


class PieceWriter:
    """Writes one piece; nothing is there under its name before `finish`."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._aside.open("wb")
        self._buffer = cast(Tokens, np.empty(_BUFFER_TOKENS, dtype))
        self._held = 0
        self._crc = 0
        self._lengths: list[npt.NDArray[np.int64]] = []
        self.tokens = 0
        self.text_bytes = 0
        """of the documents, as UTF-8; the caller counts them"""

    def begin_document(self, end_of_text: int) -> None:
        """Begin a document that is written in parts."""
        self.add_documents(np.array([end_of_text], np.uint32), end_of_text)

    def go_on(self, tokens: npt.NDArray[np.uint32]) -> None:
        """Go on with the last document; tokens lie within the vocabulary."""
        self._lengths[-1][-1] += tokens.size
        self._append(tokens)

    def add_documents(self, tokens: npt.NDArray[np.uint32], end_of_text: int) -> None:
        """Add whole documents: each begins with the end-of-text token, which is nowhere else."""
        starts = np.flatnonzero(tokens == end_of_text)
        assert starts.size and starts[0] == 0
        self._lengths.append(np.diff(starts, append=tokens.size))
        self._append(tokens)

    def _append(self, tokens: npt.NDArray[np.uint32]) -> None:
        self.tokens += tokens.size
        while tokens.size:
            part = tokens[: _BUFFER_TOKENS - self._held]
            self._buffer[self._held : self._held + part.size] = part
            self._held += part.size
            tokens = tokens[part.size :]
            if self._held == _BUFFER_TOKENS:
                self._flush()

    def _flush(self) -> None:
        data = self._buffer[: self._held].data
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)
        self._held = 0

    def finish(self) -> None:
        with self._file as file:
            self._flush()
            lengths = np.concatenate((*self._lengths, np.zeros(0, np.int64))).astype("<i8")
            file.write(lengths.data)
            file.write(_FOOTER.pack(_MAGIC, self.tokens, lengths.size, self.text_bytes, self._crc))
        self._aside.replace(self._path)

    def drop(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Piece:
    path: Path
    dtype: TokenDtype
    tokens: int
    text_bytes: int
    starts: npt.NDArray[np.int64]
    """where each document begins, and behind the last one the number of tokens"""

    @property
    def documents(self) -> int:
        return self.starts.size - 1

    def read(self, file: BinaryIO, begin: int, end: int) -> Tokens:
        """The tokens from begin to end, of the piece's open file."""
        file.seek(begin * self.dtype.itemsize)
        data = file.read((end - begin) * self.dtype.itemsize)
        return cast(Tokens, np.frombuffer(data, self.dtype))


def open_piece(path: Path, dtype: TokenDtype) -> Piece:
    """Open a piece that a worker has just finished.

    Raises:
        ValueError: if it is cut.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        tokens, text_bytes, _, lengths = _read_end(file, dtype)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Piece(path, dtype, tokens, text_bytes, starts)


def is_whole(path: Path, dtype: TokenDtype) -> bool:
    """Whether a piece that was left by an earlier call is there and undamaged."""
    try:
        with path.open("rb") as file:
            tokens, _, expected, _ = _read_end(file, dtype)
            file.seek(0)
            left, crc = tokens * dtype.itemsize, 0
            while left:
                data = file.read(min(left, _BLOCK_BYTES))
                crc = zlib.crc32(data, crc)
                left -= len(data)
    except (OSError, ValueError):
        return False
    return crc == expected


def _read_end(file: BinaryIO, dtype: TokenDtype) -> tuple[int, int, int, npt.NDArray[np.int64]]:
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
        raise ValueError("lengths that do not fit")
    return tokens, text_bytes, crc, lengths

"""Segment files: a worker's tokens of one unit, a piece of a source file, to be copied into shards.

A segment file holds the tokens, then the length of each document, then a footer with the counts.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from trainer.data.manifest import TokenDtype, Tokens
from trainer.data.tokenizer import Encoded

_FOOTER = struct.Struct("<QQQ")
_BUFFER_BYTES = 2**18


def segment_path(folder: Path, file: int, unit: int) -> Path:
    return folder / f"{file:05d}_{unit:07d}.segment"


class SegmentWriter:
    """Writes the tokens of one unit to a segment file."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self._file = path.open("wb", _BUFFER_BYTES)
        self._dtype = dtype
        self._lengths: list[int] = []
        self.tokens = 0
        self.text_bytes = 0
        """UTF-8 bytes of the documents' text, set by the caller."""

    def add_document(self, tokens: Encoded) -> None:
        self._lengths.append(tokens.size)
        self.tokens += tokens.size
        self._file.write(tokens.astype(self._dtype, copy=False).data)

    def finish(self) -> None:
        with self._file as file:
            lengths = np.array(self._lengths, "<i8")
            file.write(lengths.data)
            file.write(_FOOTER.pack(self.tokens, lengths.size, self.text_bytes))

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Segment:
    path: Path
    dtype: TokenDtype
    tokens: int
    text_bytes: int
    starts: npt.NDArray[np.int64]
    """Index of each document's first token, followed by the total number of tokens."""

    @property
    def documents(self) -> int:
        return self.starts.size - 1

    def read(self, file: BinaryIO, begin: int, end: int) -> Tokens:
        """Return tokens [begin, end) from `file`, the open segment file."""
        file.seek(begin * self.dtype.itemsize)
        data = file.read((end - begin) * self.dtype.itemsize)
        return cast(Tokens, np.frombuffer(data, self.dtype))


def open_segment(path: Path, dtype: TokenDtype) -> Segment:
    with path.open("rb") as file:
        end = file.seek(-_FOOTER.size, os.SEEK_END)
        tokens, documents, text_bytes = _FOOTER.unpack(file.read())
        file.seek(end - 8 * documents)
        lengths = np.frombuffer(file.read(8 * documents), "<i8")
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Segment(path, dtype, tokens, text_bytes, starts)

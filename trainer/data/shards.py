"""Token shards on disk, in llm.c's layout, and the manifest that says what is in them.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, then
zeros) followed by the tokens as little-endian uint16. A vocabulary that needs it has uint32, under
llm.c's header for Llama 3; version 2 of the other header is read, too. Each document begins with
the end-of-text token. Shards and manifest are written aside, synced and renamed. The manifest is
there before the first shard, listing none, and written anew after each finished one: a preparation
that was interrupted leaves a folder one can train on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import numpy as np
from pydantic import ValidationError

from nanogauge.errors import BadInput
from nanogauge.files import open_regular, read_whole, sha256_file, sync_file, write_atomic
from trainer.data.manifest import NARROW, Manifest, Origin, Position, Shard, SourceFile, Span, Split
from trainer.data.workers import Tokens

__all__ = [
    "MAGICS",
    "MANIFEST_NAME",
    "Manifest",
    "Origin",
    "Shard",
    "ShardWriter",
    "Shards",
    "Split",
    "Tokens",
    "open_shard",
    "open_split",
    "read_manifest",
    "refuse_filled",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
LARGEST_MANIFEST_BYTES = 2**28

Shards = Sequence[Tokens]
_ON_DISK = NARROW
_LAYOUTS: dict[
    tuple[int, int], np.dtype[np.uint16] | np.dtype[np.uint32]
] = {  # magic and version -> how tokens lie on disk
    (MAGIC, VERSION): _ON_DISK,
    (MAGIC, 2): np.dtype("<u4"),
    (20240801, 7): np.dtype("<u4"),  # llm.c's shards of Llama 3's tokens
}
MAGICS = frozenset(magic for magic, _ in _LAYOUTS)


class ShardWriter:
    """Fills shards with documents; a context manager.

    Leaving it normally finishes the open shard, shorter than the others. Leaving it with an error
    drops the open shard and keeps the finished ones.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        *,
        shard_tokens: int,
        prefix: str = "fineweb",
        finished: tuple[Shard, ...] = (),
    ) -> None:
        """`folder` exists and holds no shards but the `finished`; `shard_tokens` is per shard."""
        self._folder = folder
        self._origin = origin
        self._shard_tokens = shard_tokens
        self._prefix = prefix
        self._finished = list(finished)
        self._open: _OpenShard | None = None
        self.tokens: dict[Split, int] = dict.fromkeys(get_args(Split), 0)
        """tokens written to each split, those of the open shard among them"""
        for shard in finished:
            self.tokens[shard.split] += shard.tokens
        self.next: Position | None = None
        """where the source goes on; told in the manifest"""
        self.source_files: tuple[SourceFile, ...] = ()
        """the files up to there; told in the manifest"""
        self._complete = False

    @property
    def manifest(self) -> Manifest:
        """What is on disk: the finished shards."""
        return Manifest(
            **dict(self._origin),
            total_tokens=sum(shard.tokens for shard in self._finished),
            shards=tuple(self._finished),
            complete=self._complete,
            next=self.next,
            source_files=self.source_files,
        )

    @property
    def room(self) -> int:
        """Tokens until the open shard is full, or a new one."""
        return self._shard_tokens - (self._open.tokens if self._open is not None else 0)

    def write(self, split: Split, document: Tokens) -> None:
        """Append a document (1-D, at least one token) to a split.

        Documents span the shards of their split. A change of split ends the open shard, so that
        no shard holds two splits.

        Raises:
            OSError: if the disk is full or the folder cannot be written.
        """
        assert document.ndim == 1 and document.size > 0
        self.begin(split)
        begins = 1
        while document.size:
            part, document = document[: self.room], document[self.room :]
            self.append(split, part, begins)
            begins = 0

    def begin(self, split: Split) -> bool:
        """Finish the open shard if it is of another split; whether it was."""
        if self._open is None or self._open.split == split:
            return False
        self._finish()
        return True

    def append(
        self,
        split: Split,
        tokens: Tokens,
        documents: int,
        source: str | None = None,
        begins: Position | None = None,
    ) -> bool:
        """Append what fits into the open shard, and finish it if it is full; whether it was.

        Set `next` before: a shard that is finished here is listed with it.

        Args:
            split: that of the open shard (see `begin`).
            tokens: at most `room` of them.
            documents: how many of them begin a document.
            source: the source file they are from.
            begins: where in the source they begin.
        """
        assert tokens.dtype.itemsize == self._origin.dtype.itemsize and tokens.size <= self.room
        if self._open is None:
            name = f"{self._prefix}_{split}_{len(self._finished):06d}.bin"
            self._open = _OpenShard(self._folder / name, split, self._origin.dtype, begins)
        self._open.append(tokens, documents, source)
        self.tokens[split] += tokens.size
        if self.room:
            return False
        self._finish()
        return True

    def complete(self) -> None:
        """Finish the open shard; nothing is left to do."""
        self._complete = True
        if self._open is not None:
            self._finish()
        else:
            self._write_manifest()

    def _finish(self) -> None:
        assert self._open is not None
        self._finished.append(self._open.finish())
        self._open = None
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_manifest(self._folder, self.manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and not self._complete:
                self.complete()
        finally:
            if self._open is not None:
                self._open.drop()


class _OpenShard:
    """A shard that is being written, under its name with .tmp behind it."""

    def __init__(
        self,
        path: Path,
        split: Split,
        dtype: np.dtype[np.uint16] | np.dtype[np.uint32],
        begins: Position | None,
    ) -> None:
        self.split = split
        self.tokens = 0
        self._documents = 0
        self._begins = begins
        self._sources: dict[str, int] = {}
        self._dtype = dtype
        self._path = path
        self._aside = path.with_name(f"{path.name}.tmp")
        self._file = self._aside.open("w+b")
        self._file.write(bytes(HEADER_BYTES))  # the count is known at the end only

    def append(self, tokens: Tokens, documents: int, source: str | None) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self.tokens += tokens.size
        self._documents += documents
        if source is not None:
            self._sources[source] = self._sources.get(source, 0) + documents

    def finish(self) -> Shard:
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        magic, version = next(
            key for key, dtype in reversed(_LAYOUTS.items()) if dtype == self._dtype
        )
        header[:3] = magic, version, self.tokens
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
            sync_file(file)
        digest = sha256_file(self._aside)
        self._aside.replace(self._path)
        return Shard(
            file=self._path.name,
            split=self.split,
            tokens=self.tokens,
            documents=self._documents,
            sha256=digest,
            begins=self._begins,
            sources=tuple(Span(name=n, documents=d) for n, d in self._sources.items()),
        )

    def drop(self) -> None:
        with contextlib.suppress(OSError):  # the buffered rest may find no room either
            self._file.close()
        self._aside.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")


def refuse_filled(folder: Path) -> None:
    """Make sure that nothing in a folder would be overwritten by new shards.

    Raises:
        BadInput: if it holds a manifest or token shards.
    """
    held = next(folder.glob(MANIFEST_NAME), None) or next(folder.glob("*.bin"), None)
    if held is not None:
        raise BadInput(
            f"{folder} already holds token shards ({held.name}); train on them, give another "
            "--out, or delete that folder to prepare it again."
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises:
        BadInput: if there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(read_whole(path, LARGEST_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{folder} holds no token shards (no {MANIFEST_NAME}); {_remedy(folder)}"
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        told = first["msg"].removeprefix("Value error, ")
        raise BadInput(
            f"{path} is damaged ({where}: {told}); delete {folder} and {_remedy(folder)}"
        ) from None


def open_shard(path: Path, remedy: str | None = None) -> Tokens:
    """Map the tokens of one shard into memory, read-only: a 1-D array, header left out.

    Checks magic, version and that the size of the file fits the count; the hash is not checked.
    The remedy is what to do about a damaged one, which is to prepare it again if not given.

    Raises:
        BadInput: if the file is missing, is no shard, or is cut.
    """
    remedy = remedy or f"delete {path.parent} and {_remedy(path.parent)}"
    try:
        with open_regular(path) as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
            size_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise BadInput(f"the token shard {path} is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read the token shard {path}: {reason}; {remedy}") from None
    if header.nbytes < HEADER_BYTES or header[0] not in MAGICS:
        raise BadInput(f"{path} is no token shard (wrong magic number); {remedy}")
    layout = _LAYOUTS.get((int(header[0]), int(header[1])))
    if layout is None:
        raise BadInput(
            f"{path} is a token shard of version {header[1]}, which is not known; {remedy}"
        )
    count = int(header[2])
    held = (size_bytes - HEADER_BYTES) / layout.itemsize
    if count <= 0 or held != count:
        raise BadInput(
            f"{path} is damaged: its header counts {count:,} tokens and the file holds "
            f"{held:,.0f}; {remedy}"
        )
    tokens: Tokens = np.memmap(path, dtype=layout, mode="r", offset=HEADER_BYTES, shape=(count,))
    return tokens


def open_split(folder: Path, split: Split) -> list[Tokens]:
    """Map all shards of one split, in order: read-only 1-D arrays.

    Raises:
        BadInput: if the folder holds no manifest or no tokens of that split, or a shard is
            missing, damaged or not the one the manifest lists.
    """
    opened = []
    for shard in read_manifest(folder).shards:
        if shard.split == split:
            tokens = open_shard(folder / shard.file)
            if tokens.size != shard.tokens:
                raise BadInput(
                    f"{folder / shard.file} holds {tokens.size:,} tokens where {MANIFEST_NAME} "
                    f"lists {shard.tokens:,}; delete {folder} and {_remedy(folder)}"
                )
            opened.append(tokens)
    if not opened:
        raise BadInput(
            f"{folder} holds no {split} tokens: its preparation was interrupted; "
            "run the same prepare_fineweb.py command again, which goes on."
        )
    return opened


def _remedy(folder: Path) -> str:
    return f"run: python prepare_fineweb.py --out {folder}"

"""Token shards on disk in llm.c's format.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by the tokens as
uint16. Large vocabularies use uint32 with the header of llm.c's Llama 3 shards. Each document begins with the
end-of-text token.

Shards and manifest are written atomically. The manifest is written before the first shard and after each one, so an
interrupted preparation leaves a folder that can be trained on.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self, get_args

import numpy as np
from pydantic import ValidationError

from nanogauge.errors import BadInput
from nanogauge.files import open_regular, read_whole, sha256_file, sync_file, write_atomic
from nanogauge.shell import python_command
from trainer.data.manifest import NARROW, WIDE, Manifest, Origin, Position, Shard, SourceFile, Split, TokenDtype, Tokens

MANIFEST_NAME = "manifest.json"
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
LARGEST_MANIFEST_BYTES = 2**28

Shards = Sequence[Tokens]
_LAYOUTS: dict[tuple[int, int], TokenDtype] = {
    (MAGIC, VERSION): NARROW,
    (MAGIC, 2): WIDE,
    (20240801, 7): WIDE,  # llm.c's shards of Llama 3's tokens
}
"""Token dtype by magic and version."""
MAGICS = frozenset(magic for magic, _ in _LAYOUTS)


class ShardWriter:
    """Writes documents into shards; a context manager.

    A normal exit finishes the open shard, which is then shorter than the others. An exit with an exception discards the
    open shard and keeps the finished ones.
    """

    def __init__(self, folder: Path, origin: Origin, *, shard_tokens: int, finished: tuple[Shard, ...] = ()) -> None:
        """`folder` exists and holds no shards except `finished`."""
        self._folder = folder
        self.origin = origin
        """Tokenizer and source in the manifest; may be replaced before the first shard."""
        self._shard_tokens = shard_tokens
        self._finished = list(finished)
        self._open: _OpenShard | None = None
        self.tokens: dict[Split, int] = dict.fromkeys(get_args(Split), 0)
        """Number of tokens written to each split, including the open shard."""
        for shard in finished:
            self.tokens[shard.split] += shard.tokens
        self.next: Position | None = None
        """`Manifest.next`, set by the caller."""
        self.source_files: tuple[SourceFile, ...] = ()
        """`Manifest.source_files`, set by the caller."""
        self._complete = False

    @property
    def manifest(self) -> Manifest:
        """Manifest of the finished shards."""
        return Manifest(
            **dict(self.origin),
            total_tokens=sum(shard.tokens for shard in self._finished),
            shards=tuple(self._finished),
            complete=self._complete,
            next=self.next,
            source_files=self.source_files,
        )

    @property
    def room(self) -> int:
        """Number of tokens that still fit into the open shard; a full shard's if none is open."""
        return self._shard_tokens - (self._open.tokens if self._open is not None else 0)

    def start_split(self, split: Split) -> None:
        """Finish the open shard if it is of another split."""
        if self._open is not None and self._open.split != split:
            self._finish()

    def append(self, split: Split, tokens: Tokens, documents: int, begins: Position | None = None) -> None:
        """Append tokens to the open shard, and finish it if it is full.

        Call `start_split` and set `self.next` first, as filling the shard writes the manifest.

        Args:
            split: the split of the open shard.
            tokens: at most `room`.
            documents: number of documents that begin in `tokens`.
            begins: position of the first token in the source.
        """
        assert tokens.dtype.itemsize == self.origin.dtype.itemsize and tokens.size <= self.room
        if self._open is None:
            name = f"fineweb_{split}_{len(self._finished):06d}.bin"
            self._open = _OpenShard(self._folder / name, split, self.origin.dtype, begins)
        self._open.append(tokens, documents)
        self.tokens[split] += tokens.size
        if not self.room:
            self._finish()

    def complete(self) -> None:
        """Finish the open shard and mark the manifest as complete."""
        self._complete = True
        if self._open is not None:
            self._finish()
        else:
            write_manifest(self._folder, self.manifest)

    def _finish(self) -> None:
        assert self._open is not None
        if self._open.path.exists():
            # It is replaced by one with more tokens, and until then remains listed.
            at = {"next": self._open.begins, "complete": False}
            write_manifest(self._folder, self.manifest.model_copy(update=at))
        self._finished.append(self._open.finish())
        self._open = None
        write_manifest(self._folder, self.manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None and not self._complete:
                self.complete()
        finally:
            if self._open is not None:
                self._open.discard()


class _OpenShard:
    """A shard being written under a temporary name."""

    def __init__(self, path: Path, split: Split, dtype: TokenDtype, begins: Position | None) -> None:
        self.split = split
        self.tokens = 0
        self._documents = 0
        self.begins = begins
        self._dtype = dtype
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = self._temporary.open("w+b")
        self._file.write(bytes(HEADER_BYTES))  # `finish` writes the header, with the count

    def append(self, tokens: Tokens, documents: int) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self.tokens += tokens.size
        self._documents += documents

    def finish(self) -> Shard:
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        magic, version = next(key for key, dtype in reversed(_LAYOUTS.items()) if dtype == self._dtype)
        header[:3] = magic, version, self.tokens
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
            sync_file(file)
        digest = sha256_file(self._temporary)
        self._temporary.replace(self.path)
        return Shard(
            file=self.path.name,
            split=self.split,
            tokens=self.tokens,
            documents=self._documents,
            sha256=digest,
            begins=self.begins,
        )

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # flushing the buffer may fail on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")


def refuse_existing_shards(folder: Path) -> None:
    """Refuse to write new shards into a folder that already has some.

    Raises:
        BadInput: if it holds a manifest or token shards.
    """
    existing = next(folder.glob(MANIFEST_NAME), None) or next(folder.glob("*.bin"), None)
    if existing is not None:
        raise BadInput(
            f"{folder} already holds token shards ({existing.name}); train on them, give another "
            "--out, or delete that folder to prepare it again."
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises:
        BadInput: if it is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(read_whole(path, LARGEST_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder} holds no token shards (no {MANIFEST_NAME}); {_remedy(folder)}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"{path} is damaged ({where}: {reason}); delete {folder} and {_remedy(folder)}") from None


def open_shard(path: Path, remedy: str | None = None) -> Tokens:
    """Memory-map the tokens of a shard as a read-only 1-D array.

    Checks magic, version and the file size, but not the hash.

    Args:
        path: path of the shard.
        remedy: advice at the end of an error message; None advises to prepare the folder again.

    Raises:
        BadInput: if the file is missing, truncated or not a shard.
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
        raise BadInput(f"{path} is not a token shard (wrong magic number); {remedy}")
    dtype = _LAYOUTS.get((int(header[0]), int(header[1])))
    if dtype is None:
        raise BadInput(f"{path} is a token shard of the unknown version {header[1]}; {remedy}")
    count = int(header[2])
    present = (size_bytes - HEADER_BYTES) / dtype.itemsize
    if count <= 0 or present != count:
        raise BadInput(
            f"{path} is damaged: its header counts {count:,} tokens and the file holds {present:,.0f}; {remedy}"
        )
    tokens: Tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    return tokens


def open_split(folder: Path, split: Split, allow_empty: bool = False) -> list[Tokens]:
    """Memory-map all shards of a split, in order.

    Raises:
        BadInput: if there is no manifest, the split is empty unless `allow_empty`, or a shard is missing, damaged or
            different from what the manifest lists.
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
    if not opened and not allow_empty:
        raise BadInput(
            f"{folder} holds no {split} tokens: its preparation was interrupted; "
            "run the same prepare_fineweb.py command again, which resumes."
        )
    return opened


def _remedy(folder: Path) -> str:
    return f"run: {python_command('prepare_fineweb.py', '--out', folder)}"

"""Manifest of a folder of token shards: the shards, their source, where preparation resumes."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanogauge.files import stays_below

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
TokenDtype = np.dtype[np.uint16] | np.dtype[np.uint32]
NARROW: np.dtype[np.uint16] = np.dtype("<u2")
WIDE: np.dtype[np.uint32] = np.dtype("<u4")
_Count = Annotated[int, Field(ge=0)]


def token_dtype(vocab_size: int) -> TokenDtype:
    """Return the dtype of tokens on disk: uint16 if the vocabulary fits, else uint32."""
    return NARROW if vocab_size <= 2**16 else WIDE


def _inside_folder(name: str) -> str:
    if not stays_below(name):
        raise ValueError(f"{name[:60]!r} leads out of the folder")
    return name


class _Record(BaseModel):
    # Manifests of earlier versions have more keys.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Position(_Record):
    """Position in the source files, from which reading can resume."""

    file: _Count
    """Index into `Manifest.source_files`."""
    unit: _Count
    """Index of the unit, a piece of that file (see sources.py)."""
    document: _Count
    """Number of documents of that unit before this position."""
    token: _Count = 0
    """Number of tokens of that document before this position."""


START = Position(file=0, unit=0, document=0)


class SourceFile(_Record):
    """Source file, with the properties that show whether it changed since it was read."""

    name: str
    """Path in the dataset's repository, or below the local folder."""
    bytes: _Count
    sha256: str | None = None
    """Hash that the hub lists, or hash_file() of a local file; None in older manifests, or if the hub lists none."""


class Settings(_Record):
    """Settings of a preparation; on resuming, only `tokens` and `unit_bytes` may differ."""

    tokens: _Count
    """Training tokens requested."""
    val_tokens: _Count
    """Validation tokens; 0 until the length of a local source is known, of which it is a tenth."""
    shard_tokens: Annotated[int, Field(gt=0)]
    text_column: str
    unit_bytes: _Count
    """Approximate bytes of text per unit, the piece of a source file that one worker tokenizes."""


class Shard(_Record):
    file: Annotated[str, AfterValidator(_inside_folder)]
    """Path of the file below the manifest's folder."""
    split: Split
    tokens: Annotated[int, Field(gt=0)]
    documents: _Count
    """Number of documents that begin in this shard; the last may end in the next shard."""
    sha256: str
    """SHA-256 of the whole file in hexadecimal."""
    begins: Position | None = None
    """Position of the shard's first token in the source; None in older manifests."""


class Origin(_Record):
    """Tokenizer and source of the tokens in a folder's shards."""

    tokenizer: str
    tokenizer_sha256: str | None = None
    """Hash of the vocabulary (`Tokenizer.sha256`); None in older manifests."""
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    """Size of the vocabulary, including the end-of-text token."""
    end_of_text: _Count
    """Id of the end-of-text token, which each document begins with."""
    dataset: str
    """Repository on the hub, or local path."""
    dataset_config: str
    revision: str | None = None
    """Commit of the repository; None for local files."""
    settings: Settings | None = None
    """Settings of the preparation; None in older manifests."""
    characters: str | None = None
    """The vocabulary of the tokenizer chars, in the order of its tokens; None for others."""

    @property
    def dtype(self) -> TokenDtype:
        return token_dtype(self.vocab_size)


class Manifest(Origin):
    schema_version: Literal[1] = 1
    total_tokens: int
    """Number of tokens in all shards."""
    shards: tuple[Shard, ...]
    complete: bool = True
    """True if all requested tokens are written, or the source has no more."""
    next: Position | None = None
    """Position in the source after the last shard."""
    source_files: tuple[SourceFile, ...] = ()
    """Source files read so far, in order."""

    @model_validator(mode="after")
    def _check_total(self) -> Manifest:
        if self.total_tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("total_tokens is not the sum of the shards' tokens")
        return self

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def documents(self, split: Split) -> int:
        """Return the number of documents in a split; the last training document may be cut."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

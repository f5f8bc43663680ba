"""What a manifest says: of its shards, and of where their tokens come from, exactly enough to go on
from there.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanogauge.files import stays_below

NARROW = np.dtype("<u2")
WIDE = np.dtype("<u4")
Split = Literal["train", "val"]
_Count = Annotated[int, Field(ge=0)]


def _below(name: str) -> str:
    if not stays_below(name):
        raise ValueError(f"{name[:60]!r} leads out of the folder")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Position(_Record):
    """A place in the source: what comes before it has been used."""

    file: _Count
    """index into the source's files, as `Manifest.source_files` lists them"""
    unit: _Count
    """index of the piece of that file that a worker reads at once (see inputs.py)"""
    document: _Count
    """documents of that unit before this place"""
    token: _Count = 0
    """tokens of the document there before this place"""


START = Position(file=0, unit=0, document=0)


class SourceFile(_Record):
    """A file of the source, as it was when it was read."""

    name: str
    """path in the dataset's repository, or below the local folder"""
    bytes: _Count
    sha256: str | None = None
    """as the hub tells it; None where nobody does"""


class Span(_Record):
    """How much of one source file begins in a shard."""

    name: str
    documents: _Count


class Settings(_Record):
    """What an interrupted preparation must be given again so that it can go on."""

    tokens: _Count
    """training tokens"""
    val_tokens: _Count
    shard_tokens: Annotated[int, Field(gt=0)]
    text_column: str
    unit_bytes: _Count
    """bytes of text in a unit, about, which `Position` counts"""
    pattern: str | None = None
    """how words are split, where the tokenizer is a file of ranks"""

    @model_validator(mode="before")
    @classmethod
    def _drop_ranks(cls, values: object) -> object:
        """Read manifests written when a preparation could be shared between ranks."""
        if isinstance(values, dict):
            return {k: v for k, v in values.items() if k not in ("rank", "world")}
        return values


class Shard(_Record):
    file: Annotated[str, AfterValidator(_below)]
    """path of the file below the manifest's folder"""
    split: Split
    tokens: Annotated[int, Field(gt=0)]
    documents: Annotated[int, Field(ge=0)]
    """documents that begin in this shard; one may end in the next"""
    sha256: str
    """of the whole file, header and tokens, in hexadecimal"""
    begins: Position | None = None
    """where in the source its first token is; None in a joined manifest and older ones"""
    sources: tuple[Span, ...] = ()
    """the source files whose documents begin in it"""


class Origin(_Record):
    """Where the tokens come from; the same for all shards of a folder."""

    tokenizer: str
    tokenizer_sha256: str | None = None
    """of its vocabulary (see tokenizer.py); None in older manifests"""
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    """tokens the tokenizer knows, the end-of-text token among them"""
    end_of_text: Annotated[int, Field(ge=0)]
    """the token each document begins with"""
    dataset: str
    """name of the dataset's repository"""
    dataset_config: str
    revision: str | None = None
    """commit of the dataset's repository; None where there is none, as for local files"""
    settings: Settings | None = None
    """None for shards that were fetched or joined, and in older manifests"""

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Of the tokens on disk: two bytes where the vocabulary allows."""
        return NARROW if self.vocab_size <= 2**16 else WIDE


class Manifest(Origin):
    schema_version: Literal[1] = 1
    total_tokens: int
    """tokens of all shards together"""
    shards: tuple[Shard, ...]
    complete: bool = True
    """whether nothing is left to do: the tokens are reached, or the source is used up"""
    next: Position | None = None
    """where the source goes on after the last shard"""
    source_files: tuple[SourceFile, ...] = ()
    """the files up to `next`, in order"""

    @model_validator(mode="after")
    def _total_is_the_sum(self) -> Manifest:
        if self.total_tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("total_tokens is not the sum of the shards' tokens")
        return self

    def tokens(self, split: Split) -> int:
        """Tokens of one split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def documents(self, split: Split) -> int:
        """Documents of one split; the last of the training split may be cut short."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

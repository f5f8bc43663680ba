"""Where a run's tokens come from, and how to turn tokens back into text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from nanogauge.config import DataSection
from nanogauge.prepare.embedded import byte_encoding, embedded_tokens
from nanogauge.prepare.shards import open_split, read_manifest
from nanogauge.training.data import Shards, Split


@dataclass(frozen=True)
class Source:
    splits: dict[Split, Shards]
    vocab_size: int
    """of the tokenizer"""
    encoding: Callable[[], tiktoken.Encoding]
    """made when it is needed: a vocabulary may have to be downloaded first"""


def open_source(data: DataSection) -> Source:
    """Open the shards of data.path, or the embedded text.

    Raises:
        BadInput: if the shards are missing, empty or damaged.
    """
    splits: dict[Split, Shards]
    if data.embedded:
        train, validation = embedded_tokens()
        splits = {"train": [train], "val": [validation]}
        return Source(splits, byte_encoding().n_vocab, byte_encoding)
    assert data.path is not None
    folder = Path(data.path)
    manifest = read_manifest(folder)
    splits = {
        "train": open_split(folder, "train"),
        "val": open_split(folder, "val"),
    }
    return Source(splits, manifest.vocab_size, lambda: tiktoken.get_encoding(manifest.tokenizer))

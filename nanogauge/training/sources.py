"""Where a run's tokens come from, and how to turn tokens back into text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import tiktoken

from nanogauge.config import DataSection
from nanogauge.errors import BadInput
from nanogauge.prepare.embedded import byte_encoding, embedded_tokens
from nanogauge.prepare.manifest import Split
from nanogauge.prepare.opening import open_dataset
from nanogauge.prepare.tokenizer import load_encoding
from nanogauge.training.data import Shards


@dataclass(frozen=True)
class Source:
    splits: dict[Split, Shards]
    vocab_size: int | None
    """of the tokenizer; None where nothing tells"""
    encoding: Callable[[], tiktoken.Encoding]
    """made when it is needed: a vocabulary may have to be downloaded first"""
    fingerprint: str
    """tells these tokens from any others"""
    assumed: str | None = None
    """a sentence on what had to be assumed of the tokens"""


def open_source(data: DataSection) -> Source:
    """Open the shards of data.path, or the embedded text.

    Raises:
        BadInput: if the shards are missing, empty or damaged.
    """
    if data.embedded:
        train, validation = embedded_tokens()
        digest = hashlib.sha256(train.tobytes())
        digest.update(validation.tobytes())
        both: dict[Split, Shards] = {"train": [train], "val": [validation]}
        return Source(both, byte_encoding().n_vocab, byte_encoding, digest.hexdigest())
    assert data.folder is not None
    opened = open_dataset(data.folder)

    def encoding() -> tiktoken.Encoding:
        if opened.tokenizer is None:
            raise BadInput(f"nothing in {data.path} tells its tokenizer.")
        return load_encoding(opened.tokenizer, opened.pattern)

    splits: dict[Split, Shards] = {"train": opened.splits["train"], "val": opened.splits["val"]}
    return Source(splits, opened.vocab_size, encoding, opened.fingerprint, opened.assumed)

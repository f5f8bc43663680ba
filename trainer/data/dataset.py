"""Open a folder of token shards: our own, or what nanoGPT, build-nanogpt, llm.c or modded-nanogpt
wrote.

Theirs have no manifest, so what it would say is taken from the names of the files, or assumed, and
told. Nothing of it is hashed: damage that keeps the size of a file is not noticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt
import tiktoken

from nanogauge.config import DataSection
from nanogauge.errors import BadInput
from nanogauge.files import open_regular
from trainer.data.manifest import Split
from trainer.data.shards import MAGICS, MANIFEST_NAME, Shards, open_shard, open_split, read_manifest
from trainer.data.workers import Tokens

if TYPE_CHECKING:
    import tiktoken


_END_OF_TEXT = 256
VALIDATION_EVERY = 8  # every eighth topic, in alphabetical order, is held back


@cache
def byte_encoding() -> tiktoken.Encoding:
    """One token per byte, and 256 for the end of a text: nats per token are nats per byte."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": _END_OF_TEXT},
    )


def embedded_tokens() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Training and validation tokens; no topic is in both, each begins with end-of-text."""
    encoding = byte_encoding()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        held_back = index % VALIDATION_EVERY == VALIDATION_EVERY - 1
        parts[held_back].append(_END_OF_TEXT)
        parts[held_back].extend(encoding.encode_ordinary(topics[name]))
    train, validation = (np.array(p, dtype=np.uint16) for p in parts)
    return train, validation


_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val)(?:[^a-z]|$)")
_RAW = np.dtype("<u2")
_SAMPLED_TOKENS = 4096  # of either end of a file without a hash


@dataclass(frozen=True)
class OpenedFolder:
    splits: dict[Split, list[Tokens]]
    files: dict[Split, list[Path]]
    """where each of them is"""
    tokenizer: str | None
    """as --tokenizer of prepare_fineweb.py takes it; None where nothing tells"""
    vocab_size: int | None
    """tokens the tokenizer knows; None where nothing tells"""
    fingerprint: str
    """tells these tokens from any others, in hexadecimal"""
    assumed: str | None = None
    """a sentence on what was assumed"""
    pattern: str = "gpt2"
    """how words are split, where the tokenizer is a file of ranks"""

    def tokens(self, split: Split) -> int:
        return sum(shard.size for shard in self.splits[split])


def open_dataset(folder: Path) -> OpenedFolder:
    """Map all shards of both splits.

    Raises:
        BadInput: if there are none, or one is missing or damaged.
    """
    if is_foreign(folder):
        return _open_foreign(folder)
    manifest = read_manifest(folder)
    splits = {split: open_split(folder, split) for split in get_args(Split)}
    lines = [f"{shard.split} {shard.tokens} {shard.sha256}" for shard in manifest.shards]
    settings = manifest.settings
    pattern = settings.pattern if settings is not None else None
    return OpenedFolder(
        splits,
        {x: [folder / s.file for s in manifest.shards if s.split == x] for x in splits},
        manifest.tokenizer,
        manifest.vocab_size,
        _digest(lines),
        pattern=pattern or "gpt2",
    )


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds tokens and no manifest, as those of other tools do."""
    return bool(_token_files(folder)) and not (folder / MANIFEST_NAME).exists()


def _token_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".npy")]


def _open_foreign(folder: Path) -> OpenedFolder:
    splits: dict[Split, list[Tokens]] = {split: [] for split in get_args(Split)}
    files: dict[Split, list[Path]] = {split: [] for split in splits}
    lines, forms, left_out = [], set(), []
    for path in _token_files(folder):
        named = _SPLIT_IN_NAME.search(path.stem.lower())
        if named is None:
            left_out.append(path.name)
            continue
        tokens, form = _open_file(path)
        split: Split = "train" if named[1] == "train" else "val"
        splits[split].append(tokens)
        files[split].append(path)
        forms.add(form)
        ends = hashlib.sha256(tokens[:_SAMPLED_TOKENS].tobytes())
        ends.update(tokens[-_SAMPLED_TOKENS:].tobytes())
        lines.append(f"{split} {path.name} {tokens.dtype.str} {tokens.size} {ends.hexdigest()}")
    for split, shards in splits.items():
        if not shards:
            raise BadInput(
                f"{folder} holds no {MANIFEST_NAME} and no file with {split} in its name; "
                f"name its files as {split}.bin or fineweb_{split}_000000.bin"
            )
    if len(forms) > 1:
        raise BadInput(
            f"{folder} mixes {' and '.join(sorted(forms))}, so one of them is damaged or from "
            "elsewhere; keep files of one form in a folder"
        )
    form = forms.pop()
    narrow = all(shard.dtype == _RAW for shards in splits.values() for shard in shards)
    gpt2 = narrow and not (folder / "meta.pkl").exists()  # nanoGPT's sign of a tokenizer of its own
    tokenizer = "assumed to be GPT-2's" if gpt2 else "of an unknown tokenizer, no text is sampled"
    sizes = ", ".join(f"{sum(s.size for s in splits[x]):,} {x}" for x in get_args(Split))
    assumed = (
        f"{folder} has no manifest: {form}, {sizes} tokens by the names of the files, "
        f"{tokenizer}, and without hashes, so damage is not noticed"
    )
    if left_out:
        assumed += f"; left out, as no split is in their names: {', '.join(left_out)}"
    known = "gpt2" if gpt2 else None
    return OpenedFolder(splits, files, known, None, _digest(lines), f"{assumed}.")


def _open_file(path: Path) -> tuple[Tokens, str]:
    """The tokens of another tool's file, and what form of file it is."""
    try:
        if path.suffix == ".npy":
            open_regular(path).close()
            tokens = np.lib.format.open_memmap(path, mode="r")
            if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not tokens.size:
                raise BadInput(
                    f"{path} holds no row of uint16 or uint32 tokens but {tokens.dtype} of shape "
                    f"{tokens.shape}; write it as np.save(path, tokens.astype(np.uint16))"
                )
            return tokens, "NumPy arrays as build-nanogpt's"
        with open_regular(path) as file:
            magic = int.from_bytes(file.read(4), "little")
        if magic in MAGICS:
            return open_shard(path, "copy or make it again"), "shards as llm.c's"
        size = path.stat().st_size
        if size == 0 or size % _RAW.itemsize:
            raise BadInput(
                f"{path} is neither a shard as llm.c's nor uint16 tokens as nanoGPT's: it has "
                f"{size:,} bytes; copy or make it again"
            )
        return np.memmap(path, dtype=_RAW, mode="r"), "raw uint16 as nanoGPT's"
    except BadInput:
        raise
    except Exception as error:  # NumPy lets through what Python's parser makes of a broken header
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {reason}; copy or make it again") from None


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """The tokens that a run trains and evaluates on."""

    splits: dict[Split, Shards]
    vocab_size: int | None
    """Tokens of the tokenizer; None if the data does not name one."""
    encoding: Callable[[], tiktoken.Encoding]
    """Load the tokenizer, which may need a download."""
    fingerprint: str
    """Identifies these tokens, in hexadecimal."""
    assumed: str | None = None
    """What was assumed about the tokens; None if their manifest says it all."""


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
        from trainer.data.tokenizer import load_encoding

        if opened.tokenizer is None:
            raise BadInput(f"nothing in {data.path} names its tokenizer.")
        return load_encoding(opened.tokenizer, opened.pattern)

    splits: dict[Split, Shards] = {"train": opened.splits["train"], "val": opened.splits["val"]}
    return Source(splits, opened.vocab_size, encoding, opened.fingerprint, opened.assumed)

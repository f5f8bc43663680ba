"""Open the tokens of a run: Python's help texts, nanogauge's shards, or other programs' files.

Files of nanoGPT, build-nanogpt, llm.c and modded-nanogpt have no manifest. Their split comes from the file names and
their tokenizer is assumed. They have no hashes, so damage that keeps the size of a file goes unnoticed.
"""

import hashlib
import pickletools
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import get_args

import numpy as np
import numpy.typing as npt

from nanogauge.config import Config, DataSection
from nanogauge.errors import BadInput
from nanogauge.files import open_regular, read_whole
from trainer.data.manifest import NARROW, Split, Tokens
from trainer.data.shards import MAGICS, MANIFEST_NAME, Shards, open_shard, open_split, read_manifest
from trainer.data.tokenizer import BYTES, NANOGPT_CHARACTERS, Tokenizer, byte_encoding, load_tokenizer

META_NAME = "meta.pkl"
"""File in which nanoGPT keeps the vocabulary of its character data."""
LARGEST_META_BYTES = 2**24
VALIDATION_EVERY = 8
"""Every n-th topic of the embedded text, in alphabetical order, is validation data."""
_END_OF_TEXT = 256
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val)(?:[^a-z]|$)")
_HASHED_TOKENS = 4096  # at either end of a file without a hash


@dataclass(frozen=True)
class Dataset:
    """The tokens of both splits, memory-mapped or in memory, and their tokenizer."""

    splits: dict[Split, Shards]
    tokenizer: str | None
    """Name to pass to `load_tokenizer`; None if unknown."""
    vocab_size: int | None
    """Number of tokens in the vocabulary; None if unknown."""
    fingerprint: str
    """Hash that identifies the tokens, in hexadecimal."""
    characters: str = ""
    """The vocabulary of a character tokenizer, in the order of its tokens."""
    assumed: str | None = None
    """Sentence on assumptions about the tokens, such as the tokenizer; None without any."""
    repository: str | None = None
    """Hub repository or folder of the texts; None if unknown."""

    def tokens(self, split: Split) -> int:
        return sum(len(shard) for shard in self.splits[split])

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer, which may need a download.

        Raises:
            BadInput: if the tokenizer is unknown or cannot be loaded.
            RunFailed: if a download fails.
        """
        if self.tokenizer is None:
            raise BadInput("nothing in the data names its tokenizer.")
        return load_tokenizer(self.tokenizer, self.characters)


def open_dataset(data: DataSection) -> Dataset:
    """Open the shards at data.path, or the help texts embedded in Python if no path is set.

    Raises:
        BadInput: if the shards are missing, empty or damaged.
    """
    if data.folder is not None:
        return open_folder(data.folder)
    train, validation = embedded_tokens()
    digest = hashlib.sha256(train.tobytes())
    digest.update(validation.tobytes())
    splits: dict[Split, Shards] = {"train": [train], "val": [validation]}
    return Dataset(splits, BYTES, byte_encoding().n_vocab, digest.hexdigest())


def open_folder(folder: Path) -> Dataset:
    """Memory-map all shards of a folder.

    Raises:
        BadInput: if the folder has no shards, or a shard is missing or damaged.
    """
    if _token_files(folder) and not (folder / MANIFEST_NAME).exists():
        return _open_without_manifest(folder)
    manifest = read_manifest(folder)
    lines = [f"{shard.split} {shard.tokens} {shard.sha256}" for shard in manifest.shards]
    return Dataset(
        {split: open_split(folder, split) for split in get_args(Split)},
        manifest.tokenizer,
        manifest.vocab_size,
        _hash_lines(lines),
        repository=manifest.dataset,
        characters=manifest.characters or "",
    )


def open_run_data(config: Config) -> Dataset:
    """Open the data of a run.

    Raises:
        BadInput: as `open_dataset`; if its tokenizer has more tokens than the model, or a split has no shard that is
            longer than a window.
    """
    source, model = open_dataset(config.data), config.model
    if source.vocab_size is not None and source.vocab_size > model.vocab_size:
        raise BadInput(
            f"the data's tokenizer has {source.vocab_size:,} tokens but model.vocab_size is "
            f"{model.vocab_size:,}; set it to that, padded to a multiple of 64."
        )
    for split, shards in source.splits.items():
        if max(map(len, shards)) <= model.block_size:
            raise BadInput(
                f"the {split} data has no shard of more than {model.block_size} tokens; "
                "prepare more tokens or make model.block_size smaller."
            )
    return source


def count_tokens(config: Config) -> tuple[int, int]:
    """Return the numbers of training and validation tokens; raises as `open_run_data`."""
    data = open_run_data(config)
    return data.tokens("train"), data.tokens("val")


def embedded_tokens() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Return training and validation tokens of the help texts that ship with Python.

    Each topic is in one split and begins with the end-of-text token.
    """
    encoding = byte_encoding()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        validation = index % VALIDATION_EVERY == VALIDATION_EVERY - 1
        parts[validation].append(_END_OF_TEXT)
        parts[validation].extend(encoding.encode_ordinary(topics[name]))
    train, val = (np.array(part, dtype=np.uint16) for part in parts)
    return train, val


def _token_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".npy")]


def _open_without_manifest(folder: Path) -> Dataset:
    splits: dict[Split, list[Tokens]] = {split: [] for split in get_args(Split)}
    lines, formats, ignored = [], set(), []
    for path in _token_files(folder):
        named = _SPLIT_IN_NAME.search(path.stem.lower())
        if named is None:
            ignored.append(path.name)
            continue
        tokens, form = _open_file(path)
        split: Split = "train" if named[1] == "train" else "val"
        splits[split].append(tokens)
        formats.add(form)
        ends = hashlib.sha256(tokens[:_HASHED_TOKENS].tobytes())
        ends.update(tokens[-_HASHED_TOKENS:].tobytes())
        lines.append(f"{split} {path.name} {tokens.dtype.str} {tokens.size} {ends.hexdigest()}")
    for split, shards in splits.items():
        if not shards:
            raise BadInput(
                f"{folder} holds no {MANIFEST_NAME} and no file with {split} in its name; "
                f"name its files as {split}.bin or fineweb_{split}_000000.bin"
            )
    if len(formats) > 1:
        raise BadInput(
            f"{folder} mixes {' and '.join(sorted(formats))}, so one of them is damaged or from "
            "elsewhere; keep files of one format in a folder"
        )
    narrow = all(shard.dtype == NARROW for shards in splits.values() for shard in shards)
    characters, tokenizer = "", "gpt2" if narrow else None
    if (folder / META_NAME).exists():
        characters = read_meta_characters(folder / META_NAME)
        tokenizer = NANOGPT_CHARACTERS if characters else None
    of = "unknown tokenizer, so no text is sampled"
    if tokenizer is not None:
        of = "GPT-2 tokenizer assumed" if not characters else f"the characters of {META_NAME}"
    sizes = " and ".join(f"{sum(s.size for s in splits[x]):,} {x}" for x in get_args(Split))
    assumed = (
        f"{folder} has no manifest: {formats.pop()}; {sizes} tokens, by the names of the files; "
        f"{of}; no hashes, so damage is not noticed"
    )
    if ignored:
        assumed += f"; ignored, as no split is in the name: {', '.join(ignored)}"
    return Dataset(
        {"train": splits["train"], "val": splits["val"]},
        tokenizer,
        len(characters) or None,
        _hash_lines(lines),
        characters=characters,
        assumed=f"{assumed}.",
    )


def read_meta_characters(path: Path) -> str:
    """Return the vocabulary in nanoGPT's meta.pkl, in the order of the tokens; "" without one.

    Numbers and strings are read from the file in their order, and nothing is run: in the dictionary `itos` each number
    is followed by its character.
    """
    values: list[object] = []
    memo: dict[object, object] = {}
    try:
        for opcode, argument, _ in pickletools.genops(read_whole(path, LARGEST_META_BYTES)):
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = values[-1]
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = values[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                values.append(memo[argument])
            elif isinstance(argument, int | str) or opcode.name == "EMPTY_DICT":
                values.append(argument)
    except (OSError, ValueError, LookupError, struct.error):
        return ""
    begin = values.index("itos") + 2 if "itos" in values else len(values)
    characters: list[str] = []
    for token, character in zip(values[begin::2], values[begin + 1 :: 2], strict=False):
        if token != len(characters) or not isinstance(character, str) or len(character) != 1:
            break
        characters.append(character)
    return "".join(characters) if len(set(characters)) == len(characters) else ""


def _open_file(path: Path) -> tuple[Tokens, str]:
    """Return the tokens of a file that another program wrote, and the name of its format."""
    try:
        if path.suffix == ".npy":
            open_regular(path).close()
            tokens = np.lib.format.open_memmap(path, mode="r")
            if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not tokens.size:
                raise BadInput(
                    f"{path} is not a 1-D array of uint16 or uint32 tokens but {tokens.dtype} of "
                    f"shape {tokens.shape}; write it as np.save(path, tokens.astype(np.uint16))"
                )
            return tokens, "build-nanogpt's NumPy arrays"
        with open_regular(path) as file:
            magic = int.from_bytes(file.read(4), "little")
        if magic in MAGICS:
            return open_shard(path, "copy or make it again"), "llm.c's shards"
        size = path.stat().st_size
        if size == 0 or size % NARROW.itemsize:
            raise BadInput(
                f"{path} is neither a shard of llm.c nor uint16 tokens of nanoGPT: it has "
                f"{size:,} bytes; copy or make it again"
            )
        return np.memmap(path, dtype=NARROW, mode="r"), "nanoGPT's raw uint16"
    except BadInput:
        raise
    except Exception as error:  # NumPy raises whatever Python's parser raises for a bad header
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {reason}; copy or make it again") from None


def _hash_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

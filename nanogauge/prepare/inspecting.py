"""Looking at a folder of shards: whether it is what its manifest says, and what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogauge.errors import BadInput, RunFailed
from nanogauge.prepare.manifest import Manifest, Shard
from nanogauge.prepare.shards import open_shard, read_manifest
from nanogauge.prepare.tokenizer import Tokenizer, load_tokenizer

_BLOCK_TOKENS = 2**22
_SHOWN_DOCUMENTS = 3
_SHOWN_CHARACTERS = 300
_NAMED = 3


def damage_of(folder: Path, shard: Shard, manifest: Manifest) -> str | None:
    """What is wrong with a shard, in a few words; None if it is what the manifest lists."""
    path = folder / shard.file
    try:
        tokens = open_shard(path)
    except BadInput as error:
        return str(error).partition("; ")[0].replace(f"{path} ", "").replace(str(path), "it")
    if tokens.size != shard.tokens:
        return f"holds {tokens.size:,} tokens, not {shard.tokens:,}"
    if tokens.dtype != manifest.dtype:
        return f"its tokens are {tokens.dtype}, not {manifest.dtype}"
    with path.open("rb") as file:
        held = hashlib.file_digest(file, "sha256").hexdigest()
    if held != shard.sha256:
        return f"its sha256 is {held[:12]}..., not {shard.sha256[:12]}..."
    documents = 0
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        block = tokens[begin : begin + _BLOCK_TOKENS]
        if (highest := int(block.max())) >= manifest.vocab_size:
            return f"holds the token {highest}, beyond the vocabulary of {manifest.vocab_size}"
        documents += int(np.count_nonzero(block == manifest.end_of_text))
    if documents != shard.documents:
        return f"{documents:,} documents begin in it, not {shard.documents:,}"
    return None


def verify(folder: Path) -> int:
    """Check every shard of a folder against its manifest, and tell the result; the exit status.

    Raises:
        BadInput: if there is no manifest, a shard is damaged or missing, or the tokenizer of that
            name has another vocabulary here.
    """
    manifest = read_manifest(folder)
    checked = _check_tokenizer(folder, manifest)
    damaged = [
        f"{shard.file} ({damage})"
        for shard in manifest.shards
        if (damage := damage_of(folder, shard, manifest)) is not None
    ]
    if damaged:
        others = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        raise BadInput(
            f"{len(damaged)} of {len(manifest.shards)} shards in {folder} are damaged: "
            f"{', '.join(damaged[:_NAMED])}{others}; {_remedy(folder, manifest)}"
        )
    documents = manifest.documents("train") + manifest.documents("val")
    print(
        f"{len(manifest.shards)} shards with {manifest.total_tokens:,} tokens in "
        f"{documents:,} documents: headers, counts, hashes and tokens are what the manifest lists."
    )
    print(checked)
    if not manifest.complete:
        print("The preparation was interrupted; the same command goes on with it.")
    return 0


def _remedy(folder: Path, manifest: Manifest) -> str:
    if manifest.settings is not None:
        return f"run: python prepare_fineweb.py --repair {folder}"
    return "run --repair on the merged folder that holds them, or delete them and fetch them again."


def _check_tokenizer(folder: Path, manifest: Manifest) -> str:
    name = manifest.tokenizer
    if manifest.tokenizer_sha256 is None:
        return "The manifest has no hash of the tokenizer's vocabulary: not checked."
    try:
        tokenizer = _tokenizer_of(manifest)
    except (BadInput, RunFailed) as error:
        return f"The tokenizer's vocabulary was not checked: {error}"
    if (held := tokenizer.sha256()) != manifest.tokenizer_sha256:
        raise BadInput(
            f"{folder} is of another tokenizer than the {name} that is here: its vocabulary has "
            f"the sha256 {manifest.tokenizer_sha256[:12]}..., not {held[:12]}...; "
            "use the tokenizer it was made with."
        )
    return f"The vocabulary of {name} is the one they were made with."


def _tokenizer_of(manifest: Manifest) -> Tokenizer:
    settings = manifest.settings
    pattern = settings.pattern if settings is not None else None
    return load_tokenizer(manifest.tokenizer, pattern or "gpt2")


def show_stats(folder: Path, seed: int = 0) -> int:
    """Print tokens, documents, their lengths, the compression and a few documents; exit status.

    Raises:
        BadInput: if there is no manifest, or a shard is missing, cut or of another vocabulary.
        RunFailed: if the tokenizer cannot be loaded.
    """
    manifest = read_manifest(folder)
    tokenizer = _tokenizer_of(manifest)
    bytes_of = tokenizer.token_bytes()
    lengths: list[npt.NDArray[np.int64]] = []
    text_bytes = 0
    for split in ("val", "train"):
        shards = [shard for shard in manifest.shards if shard.split == split]
        starts, end = [], 0
        for shard in shards:
            tokens = open_shard(folder / shard.file)
            for begin in range(0, tokens.size, _BLOCK_TOKENS):
                block = tokens[begin : begin + _BLOCK_TOKENS]
                starts.append(np.flatnonzero(block == manifest.end_of_text) + end + begin)
                if (highest := int(block.max())) >= bytes_of.size:
                    raise BadInput(
                        f"{shard.file} in {folder} holds the token {highest}, beyond the "
                        f"vocabulary of {manifest.tokenizer}; --verify tells what is damaged."
                    )
                text_bytes += int(bytes_of[block].sum())
            end += tokens.size
        if starts:
            lengths.append(np.diff(np.concatenate((*starts, [end]))) - 1)
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    total = manifest.total_tokens
    print(f"{manifest.dataset} {manifest.dataset_config}, tokenizer {manifest.tokenizer}")
    for split in ("train", "val"):
        count = manifest.tokens(split)  # type: ignore[arg-type]
        documents = manifest.documents(split)  # type: ignore[arg-type]
        print(f"{split:5} {count:>15,} tokens {documents:>12,} documents")
    if all_lengths.size:
        on_disk = manifest.dtype.itemsize * total / max(text_bytes, 1)
        print(
            f"text  {text_bytes:>15,} bytes, {text_bytes / (total - all_lengths.size or 1):.2f} a "
            f"token; a byte of text takes {on_disk:.2f} bytes on disk"
        )
        print("\ntokens in a document")
        for line in _histogram(all_lengths):
            print(line)
    for text in _some_documents(folder, manifest, tokenizer, seed):
        print(f"\n--- a document\n{text}")
    return 0


def _histogram(lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    middle = np.percentile(lengths, (5, 50, 95)).round().astype(int).tolist()
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    most = int(bins.max())
    for power, count in enumerate(bins.tolist()):
        if count:
            yield f"  up to {2**power:>9,} {count:>11,} {'#' * max(1, round(40 * count / most))}"
    low, half, high = (f"{value:,}" for value in middle)
    yield f"  5 %: {low}   half: {half}   95 %: {high}   longest: {lengths.max():,}"


def _some_documents(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer, seed: int
) -> Iterator[str]:
    """The beginnings of a few documents, drawn at random."""
    chance = np.random.default_rng(seed)
    for _ in range(_SHOWN_DOCUMENTS if manifest.shards else 0):
        shard = manifest.shards[chance.integers(len(manifest.shards))]
        tokens = open_shard(folder / shard.file)
        starts = np.flatnonzero(tokens == manifest.end_of_text)
        if not starts.size:
            continue
        begin = int(starts[chance.integers(starts.size)]) + 1
        shown = tokens[begin : begin + _SHOWN_CHARACTERS].tolist()
        if manifest.end_of_text in shown:
            shown = shown[: shown.index(manifest.end_of_text)]
        text = tokenizer.decode(shown)
        yield text[:_SHOWN_CHARACTERS] + ("..." if len(text) > _SHOWN_CHARACTERS else "")

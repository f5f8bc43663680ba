"""Verify and summarize folders of token shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.manifest import Manifest, Shard, Split, Tokens
from trainer.data.shards import open_shard, open_split, read_manifest
from trainer.data.tokenizer import load_tokenizer

_BLOCK_TOKENS = 2**22
_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 100


def find_damage(folder: Path, shard: Shard, manifest: Manifest) -> str | None:
    """Return a phrase describing a shard's damage; None if the shard matches the manifest."""
    path = folder / shard.file
    try:
        tokens = open_shard(path)
    except BadInput as error:
        return str(error).partition("; ")[0].replace(f"{path} ", "").replace(str(path), "it")
    if tokens.size != shard.tokens:
        return f"holds {tokens.size:,} tokens, not {shard.tokens:,}"
    if tokens.dtype != manifest.dtype:
        return f"its tokens are {tokens.dtype}, not {manifest.dtype}"
    digest = sha256_file(path)
    if digest != shard.sha256:
        return f"its sha256 is {digest[:12]}..., not {shard.sha256[:12]}..."
    documents = 0
    for _, block in _blocks(tokens):
        if (highest := int(block.max())) >= manifest.vocab_size:
            return f"holds the token {highest}, beyond the vocabulary of {manifest.vocab_size}"
        documents += int(np.count_nonzero(block == manifest.end_of_text))
    if documents != shard.documents:
        return f"{documents:,} documents begin in it, not {shard.documents:,}"
    return None


def verify(folder: Path) -> int:
    """Check every shard of a folder against its manifest, print the result, return exit status.

    Raises:
        BadInput: if there are no shards, one is missing or damaged, or the installed tokenizer has
            another vocabulary.
    """
    manifest = read_manifest(folder)
    vocabulary = _check_vocabulary(folder, manifest)
    damaged = [
        f"{shard.file} ({damage})"
        for shard in manifest.shards
        if (damage := find_damage(folder, shard, manifest)) is not None
    ]
    if damaged:
        raise BadInput(
            f"{len(damaged)} of {len(manifest.shards)} shards in {folder} are damaged: "
            f"{', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''}; delete {folder} and "
            "prepare it again."
        )
    documents = manifest.documents("train") + manifest.documents("val")
    print(
        f"{len(manifest.shards)} shards with {manifest.total_tokens:,} tokens in "
        f"{documents:,} documents: headers, counts, hashes and tokens match the manifest."
    )
    print(vocabulary)
    if not manifest.complete:
        print("The preparation was interrupted; the same command resumes it.")
    return 0


def _check_vocabulary(folder: Path, manifest: Manifest) -> str:
    name = manifest.tokenizer
    if manifest.tokenizer_sha256 is None:
        return "The manifest has no hash of the tokenizer's vocabulary: not checked."
    try:
        digest = load_tokenizer(name, manifest.pattern, manifest.characters or "").sha256()
    except (BadInput, RunFailed) as error:
        return f"The tokenizer's vocabulary was not checked: {error}"
    if digest != manifest.tokenizer_sha256:
        raise BadInput(
            f"{folder} was made with another tokenizer than the {name} here: its vocabulary has "
            f"the sha256 {manifest.tokenizer_sha256[:12]}..., not {digest[:12]}...; "
            "use the tokenizer it was made with."
        )
    return f"The vocabulary of {name} is the one they were made with."


def show_stats(folder: Path) -> int:
    """Print tokens, document lengths, compression and a few documents; return exit status.

    Raises:
        BadInput: if there are no shards, or one is missing, truncated or of another tokenizer.
        RunFailed: if the tokenizer cannot be loaded.
    """
    manifest = read_manifest(folder)
    print(f"{manifest.dataset} {manifest.dataset_config}, tokenizer {manifest.tokenizer}")
    tokenizer = load_tokenizer(manifest.tokenizer, manifest.pattern, manifest.characters or "")
    bytes_of = tokenizer.token_bytes()
    lengths, beginnings = [], []
    text_bytes = disk_bytes = 0
    for split in get_args(Split):
        size, starts = 0, [np.zeros(0, np.int64)]
        for shard in open_split(folder, split, allow_empty=True):
            for begin, block in _blocks(shard):
                if (highest := int(block.max())) >= tokenizer.vocab_size:
                    raise BadInput(
                        f"{folder} holds the token {highest}, beyond the vocabulary of "
                        f"{tokenizer.name} ({tokenizer.vocab_size:,}), so it is damaged or of "
                        "another tokenizer; --verify names the file."
                    )
                found = np.flatnonzero(block == tokenizer.end_of_text)
                starts.append(found + size + begin)
                beginnings += [block[at + 1 :][:_SHOWN_TOKENS] for at in found[:1]]
                if bytes_of is not None:
                    text_bytes += int(bytes_of[block].sum())
            size += shard.size
            disk_bytes += shard.nbytes
        documents = np.concatenate(starts)
        lengths.append(np.diff(documents, append=size) - 1)
        print(f"{split:5} {size:>15,} tokens {documents.size:>12,} documents")
    if bytes_of is not None and text_bytes:
        per_byte = disk_bytes / text_bytes
        print(f"text  {text_bytes:>15,} bytes; a byte of text takes {per_byte:.2f} bytes on disk")
    if (all_lengths := np.concatenate(lengths)).size:
        low, median, high, most = np.percentile(all_lengths, (5, 50, 95, 100)).round().tolist()
        print(
            f"tokens per document: median {median:,.0f}, 5 % to 95 % {low:,.0f} to {high:,.0f}, "
            f"longest {most:,.0f}"
        )
    for tokens in beginnings[-_SHOWN_DOCUMENTS:]:
        ends = np.flatnonzero(tokens == tokenizer.end_of_text)
        shown = tokens[: ends[0]] if ends.size else tokens
        print(f"\n--- the beginning of a document\n{tokenizer.decode(shown.tolist())}")
    return 0


def _blocks(tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
    """Yield the tokens in blocks, each with the index of its first token."""
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        yield begin, tokens[begin : begin + _BLOCK_TOKENS]

"""Verify folders of token shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.manifest import Manifest, Shard, Tokens
from trainer.data.shards import open_shard, read_manifest
from trainer.data.tokenizer import load_tokenizer

_BLOCK_TOKENS = 2**22


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
    for block in _blocks(tokens):
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


def _blocks(tokens: Tokens) -> Iterator[Tokens]:
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        yield tokens[begin : begin + _BLOCK_TOKENS]

"""Verify folders of token shards."""

from pathlib import Path

import numpy as np

from nanogauge.errors import BadInput
from nanogauge.files import sha256_file
from trainer.data.manifest import Manifest, Shard
from trainer.data.shards import open_shard, read_manifest

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
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        block = tokens[begin : begin + _BLOCK_TOKENS]
        if (highest := int(block.max())) >= manifest.vocab_size:
            return f"holds the token {highest}, beyond the vocabulary of {manifest.vocab_size}"
        documents += int(np.count_nonzero(block == manifest.end_of_text))
    if documents != shard.documents:
        return f"{documents:,} documents begin in it, not {shard.documents:,}"
    return None


def verify(folder: Path) -> int:
    """Check every shard of a folder against its manifest, print the result, return exit status.

    Raises:
        BadInput: if there are no shards, or one is missing or damaged.
    """
    manifest = read_manifest(folder)
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
    if not manifest.complete:
        print("The preparation was interrupted; the same command resumes it.")
    return 0

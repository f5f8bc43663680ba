"""Preparing on more than one machine: each rank takes its source files, one manifest joins them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.prepare.manifest import Manifest, Shard
from nanogauge.prepare.placing import rank_folder
from nanogauge.prepare.shards import (
    MANIFEST_NAME,
    open_shard,
    read_manifest,
    refuse_filled,
    write_manifest,
)

_ORIGIN = (
    *("tokenizer", "tokenizer_sha256", "vocab_size", "end_of_text"),
    *("dataset", "dataset_config", "revision"),
)


def merge_if_all_there(out: Path, world: int) -> bool:
    """Join the ranks' folders below `out` if all are complete; whether they were.

    Raises:
        BadInput: if they are not of one preparation.
    """
    folders = [rank_folder(out, rank, world) for rank in range(world)]
    if not all((folder / MANIFEST_NAME).exists() for folder in folders):
        return False
    manifests = [read_manifest(folder) for folder in folders]
    if not all(manifest.complete for manifest in manifests):
        return False
    write_manifest(out, joined(folders, manifests, out))
    return True


def merge(folders: Sequence[Path], out: Path) -> int:
    """Join folders of shards in `out`: linked there, or copied from another disk.

    Raises:
        BadInput: if one is damaged or not complete, they do not belong together, or `out` is
            filled.
    """
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if not manifest.complete:
            raise BadInput(f"{folder} is not complete; run its command again, then merge.")
        for shard in manifest.shards:
            open_shard(folder / shard.file)
    refuse_filled(out)
    places = []
    for number, folder in enumerate(folders):
        place = folder
        if not folder.resolve().is_relative_to(out.resolve()):
            place = out / f"part_{number:05d}"
            place.mkdir(parents=True, exist_ok=True)
            for file in (MANIFEST_NAME, *(shard.file for shard in manifests[number].shards)):
                _link(folder / file, place / file)
        places.append(place)
    manifest = joined(places, manifests, out)
    write_manifest(out, manifest)
    print(
        f"{len(manifest.shards)} shards with {manifest.tokens('train'):,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens of {len(folders)} folders are in {out}."
    )
    return 0


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def joined(folders: Sequence[Path], manifests: Sequence[Manifest], out: Path) -> Manifest:
    """One manifest of all, validation first.

    Raises:
        BadInput: if they are of different tokenizers or preparations.
    """
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        for key in _ORIGIN:
            if getattr(manifest, key) != getattr(first, key):
                raise BadInput(
                    f"{folders[0]} and {folder} do not belong together: their {key} is "
                    f"{getattr(first, key)} and {getattr(manifest, key)}."
                )
    parts = {(s.rank, s.world) for manifest in manifests if (s := manifest.settings) is not None}
    if len(parts) < len(manifests):
        raise BadInput("two of the folders are of the same part of the source, or of none.")
    shards: list[Shard] = []
    for folder, manifest in zip(folders, manifests, strict=True):
        below = folder.resolve().relative_to(out.resolve())
        for shard in manifest.shards:
            update = {"file": (below / shard.file).as_posix(), "begins": None}
            shards.append(shard.model_copy(update=update))
    shards.sort(key=lambda shard: shard.split != "val")
    return Manifest(
        **{key: getattr(first, key) for key in _ORIGIN},
        total_tokens=sum(shard.tokens for shard in shards),
        shards=tuple(shards),
        source_files=tuple(file for manifest in manifests for file in manifest.source_files),
    )

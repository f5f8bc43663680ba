"""Ready shards from a dataset on the hub, for those who don't want to tokenise."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.hub import client_errors, fetch_file, interrupted, patiently, quiet, short
from trainer.data.manifest import Manifest, Shard, SourceFile, Span, Split
from trainer.data.shards import (
    HEADER_BYTES,
    MANIFEST_NAME,
    open_shard,
    read_manifest,
    refuse_filled,
    write_manifest,
)
from trainer.data.tokenizer import load_tokenizer

_FETCHED = ".fetched"
_NARROW_BYTES = 2


def fetch_command(
    repository: str, revision: str | None, tokenizer: str, tokens: int, out: Path
) -> int:
    """Fetch as many shards as hold so many training tokens, and all for validation; exit status.

    Raises:
        BadInput: if there are none, they are not what they should be, or the disk is too small.
        RunFailed: if one cannot be fetched; those that are there stay, and are gone on with.
    """
    quiet()
    revision, files = _list(repository, revision)
    wanted = _wanted(repository, files, tokens)
    manifest = _begun(repository, revision, tokenizer, out)
    have = {span.name for shard in manifest.shards for span in shard.sources}
    missing = [(split, file) for split, file in wanted if file.path not in have]
    out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size for _, file in missing), shutil.disk_usage(out).free
    if needed > free:
        raise BadInput(
            f"the shards need {needed / 1e9:,.1f} GB, and {out} has {free / 1e9:,.1f} GB free; "
            "make room, give fewer --tokens, or an --out on another disk."
        )
    try:
        write_manifest(out, manifest)  # a shard without one would be taken for another tool's
        for number, (split, file) in enumerate(missing, 1):
            print(f"shard {number} of {len(missing)}: {file.path}", file=sys.stderr, flush=True)
            manifest = _add(manifest, split, file, out)
    except RunFailed as error:
        raise RunFailed(
            f"{error}; {len(manifest.shards)} shards stay in {out}: run the same command again, "
            "which goes on from there."
        ) from None
    except OSError as error:
        raise RunFailed(
            f"cannot write to {out}: {error.strerror}; {len(manifest.shards)} shards stay there."
        ) from None
    finally:
        shutil.rmtree(out / _FETCHED, ignore_errors=True)
    write_manifest(out, manifest.model_copy(update={"complete": True}))
    print(
        f"{len(manifest.shards)} shards with {manifest.tokens('train'):,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens are in {out}.\n"
        f"Next: python train.py configs/rtx4070_fineweb.toml --data.path {out}"
    )
    return 0


def _list(repository: str, revision: str | None) -> tuple[str, list[Any]]:
    """The commit, and the .bin files of it with their sizes."""
    from huggingface_hub import HfApi

    def ask() -> tuple[str, list[Any]]:
        try:
            commit = HfApi().dataset_info(repository, revision=revision).sha
            assert commit is not None
            tree = HfApi().list_repo_tree(
                repository, recursive=True, revision=commit, repo_type="dataset"
            )
            return commit, [file for file in tree if file.path.endswith(".bin")]
        except client_errors() as error:
            raise interrupted(error) or BadInput(
                f"cannot open the dataset {repository}: {short(error)}; give --pretokenized as "
                "the hub lists it."
            ) from None

    return patiently(repository, ask)


def _wanted(repository: str, files: list[Any], tokens: int) -> list[tuple[Split, Any]]:
    """The files to fetch, by their names and sizes: validation, then enough for training."""
    wanted: list[tuple[Split, Any]] = []
    left = tokens
    for file in sorted(files, key=lambda file: str(file.path)):
        if "val" in Path(file.path).name:
            wanted.insert(0, ("val", file))
        elif left > 0:
            wanted.append(("train", file))
            left -= (file.size - HEADER_BYTES) // _NARROW_BYTES
    if {split for split, _ in wanted} != set(get_args(Split)):
        raise BadInput(
            f"{repository} has no .bin files for training and for validation (with val in their "
            "names); give another --pretokenized."
        )
    return wanted


def _begun(repository: str, revision: str, name: str, out: Path) -> Manifest:
    """The manifest of an earlier call, or that of nothing."""
    tokenizer = load_tokenizer(name)
    begun_here = False  # with nothing in it yet
    if (out / MANIFEST_NAME).exists():
        manifest = read_manifest(out)
        same = (manifest.dataset, manifest.revision) == (repository, revision)
        if manifest.settings is None and same and manifest.tokenizer == name:
            return manifest
        begun_here = manifest.settings is None and not manifest.shards
    if not begun_here:
        refuse_filled(out)
    return Manifest(
        tokenizer=name,
        tokenizer_sha256=tokenizer.sha256(),
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dataset=repository,
        dataset_config="pretokenized",
        revision=revision,
        total_tokens=0,
        shards=(),
        complete=False,
    )


def _add(manifest: Manifest, split: Split, file: Any, out: Path) -> Manifest:
    """Fetch a shard, check it, put it into its place and into the manifest."""
    assert manifest.revision is not None
    sha256 = file.lfs.sha256 if file.lfs is not None else None
    fetched = fetch_file(manifest.dataset, file.path, manifest.revision, sha256, out / _FETCHED)
    tokens = open_shard(fetched, f"{manifest.dataset} holds it so: give another --pretokenized.")
    if (highest := int(tokens.max())) >= manifest.vocab_size:
        raise BadInput(
            f"{file.path} holds the token {highest}, beyond the vocabulary of "
            f"{manifest.tokenizer}; give the --tokenizer it was made with."
        )
    documents = int(np.count_nonzero(tokens == manifest.end_of_text))
    shard = Shard(
        file=fetched.name,
        split=split,
        tokens=tokens.size,
        documents=documents,
        sha256=sha256_file(fetched),
        sources=(Span(name=file.path, documents=documents),),
    )
    fetched.replace(out / fetched.name)
    source = SourceFile(name=file.path, bytes=file.size, sha256=sha256)
    update = {
        "shards": (*manifest.shards, shard),
        "total_tokens": manifest.total_tokens + shard.tokens,
        "source_files": (*manifest.source_files, source),
    }
    manifest = manifest.model_copy(update=update)
    write_manifest(out, manifest)
    return manifest

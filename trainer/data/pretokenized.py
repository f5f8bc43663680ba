"""Download ready token shards from a dataset on the hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.hub import (
    as_interrupted,
    client_errors,
    fetch_file,
    first_line,
    silence_client,
    with_retries,
)
from trainer.data.manifest import NARROW, FileShare, Manifest, Shard, SourceFile, Split
from trainer.data.shards import (
    HEADER_BYTES,
    MANIFEST_NAME,
    open_shard,
    read_manifest,
    refuse_existing_shards,
    write_manifest,
)
from trainer.data.tokenizer import load_tokenizer

_DOWNLOADS = ".fetched"


def fetch_shards(
    repository: str, revision: str | None, tokenizer: str, tokens: int, out: Path
) -> Manifest:
    """Download the validation shards and as many training shards as the tokens need.

    Raises:
        BadInput: if there are none, one is invalid, or the disk is too small.
        RunFailed: if a download fails; finished shards stay, and the next call resumes.
    """
    silence_client()
    revision, files = _list_files(repository, revision)
    selected = _select_files(repository, files, tokens)
    manifest = _open_manifest(repository, revision, tokenizer, out)
    present = {share.name for shard in manifest.shards for share in shard.sources}
    missing = [(split, file) for split, file in selected if file.path not in present]
    out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size for _, file in missing), shutil.disk_usage(out).free
    if needed > free:
        raise BadInput(
            f"the shards need {needed / 1e9:,.1f} GB, and {out} has {free / 1e9:,.1f} GB free; "
            "make room, give fewer --tokens, or an --out on another disk."
        )
    try:
        write_manifest(out, manifest)  # shards without a manifest would seem another program's
        for number, (split, file) in enumerate(missing, 1):
            print(f"shard {number} of {len(missing)}: {file.path}", file=sys.stderr, flush=True)
            manifest = _fetch_shard(manifest, split, file, out)
        manifest = manifest.model_copy(update={"complete": True})
        write_manifest(out, manifest)
    except RunFailed as error:
        raise RunFailed(
            f"{error}; {len(manifest.shards)} shards stay in {out}: run the same command again "
            "to resume."
        ) from None
    except OSError as error:
        raise RunFailed(
            f"cannot write to {out}: {error.strerror}; {len(manifest.shards)} shards stay there."
        ) from None
    finally:
        shutil.rmtree(out / _DOWNLOADS, ignore_errors=True)
    return manifest


def _list_files(repository: str, revision: str | None) -> tuple[str, list[Any]]:
    """Return the commit and its .bin files."""
    from huggingface_hub import HfApi

    def request() -> tuple[str, list[Any]]:
        try:
            commit = HfApi().dataset_info(repository, revision=revision).sha
            assert commit is not None
            tree = HfApi().list_repo_tree(
                repository, recursive=True, revision=commit, repo_type="dataset"
            )
            return commit, [file for file in tree if file.path.endswith(".bin")]
        except client_errors() as error:
            raise as_interrupted(error) or BadInput(
                f"cannot open the dataset {repository}: {first_line(error)}; give --pretokenized "
                "as the hub lists it."
            ) from None

    return with_retries(repository, request)


def _select_files(repository: str, files: list[Any], tokens: int) -> list[tuple[Split, Any]]:
    """Return all validation files, then enough training files, by their names and sizes."""
    selected: list[tuple[Split, Any]] = []
    left = tokens
    for file in sorted(files, key=lambda file: str(file.path)):
        if "val" in Path(file.path).name:
            selected.insert(0, ("val", file))
        elif left > 0:
            selected.append(("train", file))
            left -= (file.size - HEADER_BYTES) // NARROW.itemsize
    if {split for split, _ in selected} != set(get_args(Split)):
        raise BadInput(
            f"{repository} has no .bin files for training and for validation (with val in their "
            "names); give another --pretokenized."
        )
    return selected


def _open_manifest(repository: str, revision: str, name: str, out: Path) -> Manifest:
    """Return the manifest of an earlier call, or an empty one."""
    tokenizer = load_tokenizer(name)
    empty = False
    if (out / MANIFEST_NAME).exists():
        manifest = read_manifest(out)
        same = (manifest.dataset, manifest.revision) == (repository, revision)
        if manifest.settings is None and same and manifest.tokenizer == name:
            return manifest
        empty = manifest.settings is None and not manifest.shards
    if not empty:
        refuse_existing_shards(out)
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


def _fetch_shard(manifest: Manifest, split: Split, file: Any, out: Path) -> Manifest:
    """Download and check a shard, move it into the folder and add it to the manifest."""
    assert manifest.revision is not None
    sha256 = file.lfs.sha256 if file.lfs is not None else None
    path = fetch_file(manifest.dataset, file.path, manifest.revision, sha256, out / _DOWNLOADS)
    tokens = open_shard(path, f"{manifest.dataset} holds it so: give another --pretokenized.")
    if (highest := int(tokens.max())) >= manifest.vocab_size:
        raise BadInput(
            f"{file.path} holds the token {highest}, beyond the vocabulary of "
            f"{manifest.tokenizer}; give the --tokenizer it was made with."
        )
    documents = int(np.count_nonzero(tokens == manifest.end_of_text))
    shard = Shard(
        file=path.name,
        split=split,
        tokens=tokens.size,
        documents=documents,
        sha256=sha256_file(path),
        sources=(FileShare(name=file.path, documents=documents),),
    )
    path.replace(out / path.name)
    source = SourceFile(name=file.path, bytes=file.size, sha256=sha256)
    update = {
        "shards": (*manifest.shards, shard),
        "total_tokens": manifest.total_tokens + shard.tokens,
        "source_files": (*manifest.source_files, source),
    }
    manifest = manifest.model_copy(update=update)
    write_manifest(out, manifest)
    return manifest

"""Verify, repair and summarize folders of token shards."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.dataset import Dataset, has_no_manifest, open_folder
from trainer.data.manifest import Manifest, Shard, Split, Tokens
from trainer.data.prepare import ExistingOutput, PrepareOptions, prepare
from trainer.data.shards import MANIFEST_NAME, open_shard, read_manifest
from trainer.data.tokenizer import Tokenizer, load_tokenizer

GPT2_END_OF_TEXT = 50256
"""The highest token of GPT-2."""
REPAIRED = ".repaired"
_BLOCK_TOKENS = 2**22
_SHOWN_DOCUMENTS = 3
_SHOWN_CHARACTERS = 300
_SHOWN_SHARDS = 3


def find_damage(folder: Path, shard: Shard, manifest: Manifest) -> str | None:
    """Describe the damage of a shard in a few words; None if it is what the manifest lists."""
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

    Without a manifest, check what is possible.

    Raises:
        BadInput: if there are no shards, one is missing or damaged, or the installed tokenizer has
            another vocabulary.
    """
    if has_no_manifest(folder):
        return _verify_without_manifest(folder)
    manifest = read_manifest(folder)
    vocabulary = _check_vocabulary(folder, manifest)
    damaged = [
        f"{shard.file} ({damage})"
        for shard in manifest.shards
        if (damage := find_damage(folder, shard, manifest)) is not None
    ]
    if damaged:
        more = f" and {len(damaged) - _SHOWN_SHARDS} more" if len(damaged) > _SHOWN_SHARDS else ""
        remedy = f"run: python prepare_fineweb.py --repair {folder}"
        if manifest.settings is None:
            remedy = "run --repair on the part that holds them, or delete and fetch them again."
        raise BadInput(
            f"{len(damaged)} of {len(manifest.shards)} shards in {folder} are damaged: "
            f"{', '.join(damaged[:_SHOWN_SHARDS])}{more}; {remedy}"
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


def _verify_without_manifest(folder: Path) -> int:
    dataset = open_folder(folder)  # checks names, formats, sizes and types
    documents, highest = 0, 0
    for split in get_args(Split):
        for path, tokens in zip(dataset.files[split], dataset.splits[split], strict=True):
            for _, block in _blocks(tokens):
                highest = max(highest, int(block.max()))
                documents += int(np.count_nonzero(block == GPT2_END_OF_TEXT))
            if dataset.tokenizer == "gpt2" and highest > GPT2_END_OF_TEXT:
                raise BadInput(
                    f"{path} holds the token {highest}, beyond GPT-2's {GPT2_END_OF_TEXT + 1:,}: "
                    "copy or make it again, or, if it is of another tokenizer, put an empty "
                    "meta.pkl beside it."
                )
    print(dataset.assumed)
    print(f"Sizes, formats and types are valid; the highest token is {highest:,}.")
    if dataset.tokenizer == "gpt2":
        print(f"It is in GPT-2's vocabulary; {documents:,} tokens are GPT-2's end-of-text token.")
    else:
        print("Not checked: whether it is in the vocabulary, as the tokenizer is unknown.")
    print("Not checked: hashes and the numbers of tokens and documents, as there is no manifest.")
    return 0


def _check_vocabulary(folder: Path, manifest: Manifest) -> str:
    name = manifest.tokenizer
    if manifest.tokenizer_sha256 is None:
        return "The manifest has no hash of the tokenizer's vocabulary: not checked."
    settings = manifest.settings
    pattern = settings.pattern if settings is not None else None
    try:
        digest = load_tokenizer(name, pattern or "gpt2").sha256()
    except (BadInput, RunFailed) as error:
        return f"The tokenizer's vocabulary was not checked: {error}"
    if digest != manifest.tokenizer_sha256:
        raise BadInput(
            f"{folder} was made with another tokenizer than the {name} here: its vocabulary has "
            f"the sha256 {manifest.tokenizer_sha256[:12]}..., not {digest[:12]}...; "
            "use the tokenizer it was made with."
        )
    return f"The vocabulary of {name} is the one they were made with."


def show_stats(folder: Path, seed: int = 0) -> int:
    """Print tokens, document lengths, compression and a few documents; return exit status.

    Raises:
        BadInput: if there are no shards, or one is missing, truncated or of another tokenizer.
        RunFailed: if the tokenizer cannot be loaded.
    """
    dataset = open_folder(folder, allow_empty=True)
    if dataset.assumed is not None:
        print(dataset.assumed)
    else:
        manifest = read_manifest(folder)
        print(f"{manifest.dataset} {manifest.dataset_config}, tokenizer {manifest.tokenizer}")
    if dataset.tokenizer is None:
        for split in get_args(Split):
            print(f"{split:5} {dataset.tokens(split):>15,} tokens")
        print("Texts and lengths are not shown: the tokenizer is unknown.")
        return 0
    tokenizer = load_tokenizer(dataset.tokenizer, dataset.pattern)
    bytes_of = tokenizer.token_bytes()
    lengths: list[npt.NDArray[np.int64]] = []
    text_bytes = total = disk_bytes = 0
    for split in get_args(Split):
        ends, size = [np.zeros(0, np.int64)], 0
        for shard in dataset.splits[split]:
            for begin, block in _blocks(shard):
                if (highest := int(block.max())) >= tokenizer.vocab_size:
                    raise BadInput(
                        f"{folder} holds the token {highest}, beyond the vocabulary of "
                        f"{tokenizer.name} ({tokenizer.vocab_size:,}), so it is damaged or of "
                        "another tokenizer; --verify names the file."
                    )
                ends.append(np.flatnonzero(block == tokenizer.end_of_text) + size + begin)
                if bytes_of is not None:
                    text_bytes += int(bytes_of[block].sum())
            size += shard.size
            disk_bytes += shard.nbytes
        positions = np.concatenate(ends)
        lengths.append(_document_lengths(positions, size))
        total += size
        print(f"{split:5} {size:>15,} tokens {positions.size:>12,} documents")
    all_lengths = np.concatenate(lengths)
    if not all_lengths.size:
        print("Lengths and documents are not shown: there is no end-of-text token.")
        return 0
    if bytes_of is None:
        print("Bytes of text are not shown: this tokenizer's tokens have no fixed bytes.")
    else:
        print(
            f"text  {text_bytes:>15,} bytes, {text_bytes / (total - all_lengths.size or 1):.2f} a "
            f"token; a byte of text takes {disk_bytes / max(text_bytes, 1):.2f} bytes on disk"
        )
    print("\ntokens per document")
    for line in _histogram(all_lengths):
        print(line)
    for text in _sample_documents(dataset, tokenizer, seed):
        print(f"\n--- a document\n{text}")
    return 0


def _blocks(tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
    """Yield the first index and the tokens of each block."""
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        yield begin, tokens[begin : begin + _BLOCK_TOKENS]


def _document_lengths(ends: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.int64]:
    """Return the tokens of each document, from the positions of the end-of-text tokens.

    We, llm.c and build-nanogpt write that token before a document, nanoGPT after it. It comes after
    if the split does not begin with one; tokens after the last one are then not counted.
    """
    if not ends.size:
        return ends
    edges = (ends, [tokens]) if ends[0] == 0 else ([-1], ends)
    lengths: npt.NDArray[np.int64] = np.diff(np.concatenate(edges)) - 1
    return lengths


def _histogram(lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    percentiles = np.percentile(lengths, (5, 50, 95)).round().astype(int).tolist()
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    most = int(bins.max())
    for power, count in enumerate(bins.tolist()):
        if count:
            yield f"  up to {2**power:>9,} {count:>11,} {'#' * max(1, round(40 * count / most))}"
    low, median, high = (f"{value:,}" for value in percentiles)
    yield f"  5 %: {low}   median: {median}   95 %: {high}   longest: {lengths.max():,}"


def _sample_documents(dataset: Dataset, tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """Yield the beginnings of a few random documents."""
    generator = np.random.default_rng(seed)
    shards = [shard for split in dataset.splits.values() for shard in split]
    for _ in range(_SHOWN_DOCUMENTS):
        tokens = shards[generator.integers(len(shards))]
        ends = np.flatnonzero(tokens[:-1] == tokenizer.end_of_text)
        if not ends.size:
            continue
        begin = int(ends[generator.integers(ends.size)]) + 1
        shown = tokens[begin : begin + _SHOWN_CHARACTERS].tolist()
        if tokenizer.end_of_text in shown:
            shown = shown[: shown.index(tokenizer.end_of_text)]
        text = tokenizer.decode(shown)
        yield text[:_SHOWN_CHARACTERS] + ("..." if len(text) > _SHOWN_CHARACTERS else "")


def repair(folder: Path, workers: int) -> int:
    """Rebuild every damaged or missing shard from the source; return exit status.

    Raises:
        BadInput: if there is no manifest, or it does not say where its shards begin.
        RunFailed: if the source now gives other tokens; the shard stays as it is.
    """
    manifest = read_manifest(folder)
    damaged = [s for s in manifest.shards if find_damage(folder, s, manifest) is not None]
    for shard in damaged:
        print(f"rebuilding {shard.file}", file=sys.stderr, flush=True)
        _rebuild(folder, manifest, shard, workers)
    print(f"{len(damaged)} of {len(manifest.shards)} shards were rebuilt in {folder}.")
    return 0


def _rebuild(folder: Path, manifest: Manifest, shard: Shard, workers: int) -> None:
    settings = manifest.settings
    if settings is None or shard.begins is None:
        raise BadInput(
            f"{folder / MANIFEST_NAME} does not say where in the source {shard.file} begins; "
            "repair the folder it was joined from, or delete it and fetch it again."
        )
    out = folder / REPAIRED
    options = PrepareOptions(
        out=out,
        tokens=shard.tokens,
        val_tokens=0,
        shard_tokens=shard.tokens,
        dataset=manifest.dataset,
        config=None if manifest.dataset_config == "default" else manifest.dataset_config,
        workers=workers,
        text_column=settings.text_column,
        tokenizer=manifest.tokenizer,
        pattern=settings.pattern or "gpt2",
    )
    begun = manifest.model_copy(
        update={
            "shards": (),
            "total_tokens": 0,
            "complete": False,
            "settings": settings.model_copy(update={"val_tokens": 0, "shard_tokens": shard.tokens}),
        }
    )
    try:
        existing = ExistingOutput(out, begun, False, (), shard.begins)
        with options.worker_pool() as pool:
            rebuilt = prepare(options, lambda _: None, pool, existing)
        if [new.sha256 for new in rebuilt.shards] != [shard.sha256]:
            raise RunFailed(
                f"{manifest.dataset} gives other tokens for {shard.file} than it did; its files "
                "or the tokenizer have changed."
            )
        (out / rebuilt.shards[0].file).replace(folder / shard.file)
    finally:
        shutil.rmtree(out, ignore_errors=True)

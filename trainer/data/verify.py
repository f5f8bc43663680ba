"""Looking at a folder of shards: whether it is what its manifest says, and what is in it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file
from trainer.data.dataset import is_foreign, open_dataset
from trainer.data.manifest import Manifest, Shard, Split
from trainer.data.prepare import EarlierOutput, Order, crew_of, prepare
from trainer.data.shards import open_shard, read_manifest
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.workers import Tokens

GPT2_END_OF_TEXT = 50256
"""the highest of GPT-2's tokens"""
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
    held = sha256_file(path)
    if held != shard.sha256:
        return f"its sha256 is {held[:12]}..., not {shard.sha256[:12]}..."
    documents = 0
    for _, block in _blocks(tokens):
        if (highest := int(block.max())) >= manifest.vocab_size:
            return f"holds the token {highest}, beyond the vocabulary of {manifest.vocab_size}"
        documents += int(np.count_nonzero(block == manifest.end_of_text))
    if documents != shard.documents:
        return f"{documents:,} documents begin in it, not {shard.documents:,}"
    return None


def verify(folder: Path) -> int:
    """Check every shard of a folder against its manifest, and tell the result; the exit status.

    Of a folder that another tool wrote, what can be checked without a manifest.

    Raises:
        BadInput: if there are no shards, one is damaged or missing, or the tokenizer of that name
            has another vocabulary here.
    """
    if is_foreign(folder):
        return _verify_foreign(folder)
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


def _verify_foreign(folder: Path) -> int:
    opened = open_dataset(folder)  # which checks names, forms, sizes and types
    documents, highest = 0, 0
    for split in get_args(Split):
        for path, tokens in zip(opened.files[split], opened.splits[split], strict=True):
            for _, block in _blocks(tokens):
                highest = max(highest, int(block.max()))
                documents += int(np.count_nonzero(block == GPT2_END_OF_TEXT))
            if opened.tokenizer == "gpt2" and highest > GPT2_END_OF_TEXT:
                raise BadInput(
                    f"{path} holds the token {highest}, beyond GPT-2's {GPT2_END_OF_TEXT + 1:,}: "
                    "copy or make it again, or, if it is of another tokenizer, put an empty "
                    "meta.pkl beside it, which says so."
                )
    print(opened.assumed)
    print(f"Sizes, forms and types are as they should be; the highest token is {highest:,}.")
    if opened.tokenizer == "gpt2":
        print(f"It is within GPT-2's vocabulary; {documents:,} of the tokens are its end of text.")
    else:
        print("Not checked: whether that is within the vocabulary, as nothing tells the tokenizer.")
    print("Not checked: hashes, counts and documents, as no manifest says what they should be.")
    return 0


def _remedy(folder: Path, manifest: Manifest) -> str:
    if manifest.settings is not None:
        return f"run: python prepare_fineweb.py --repair {folder}"
    return "run --repair on the part that holds them, or delete them and fetch them again."


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


@dataclass(frozen=True)
class _Inside:
    """What there is to show of a folder."""

    title: str
    splits: dict[Split, list[Tokens]]
    tokenizer: Tokenizer | None
    """None where nothing tells it"""


def _inside(folder: Path) -> _Inside:
    if is_foreign(folder):
        opened = open_dataset(folder)
        tokenizer = load_tokenizer(opened.tokenizer) if opened.tokenizer is not None else None
        return _Inside(str(opened.assumed), opened.splits, tokenizer)
    manifest = read_manifest(folder)
    splits: dict[Split, list[Tokens]] = {split: [] for split in get_args(Split)}
    for shard in manifest.shards:
        splits[shard.split].append(open_shard(folder / shard.file))
    title = f"{manifest.dataset} {manifest.dataset_config}, tokenizer {manifest.tokenizer}"
    return _Inside(title, splits, _tokenizer_of(manifest))


def show_stats(folder: Path, seed: int = 0) -> int:
    """Print tokens, documents, their lengths, the compression and a few documents; exit status.

    Raises:
        BadInput: if there are no shards, or one is missing, cut or of another tokenizer.
        RunFailed: if the tokenizer cannot be loaded.
    """
    inside = _inside(folder)
    tokenizer = inside.tokenizer
    print(inside.title)
    if tokenizer is None:
        for split in get_args(Split):
            print(f"{split:5} {sum(shard.size for shard in inside.splits[split]):>15,} tokens")
        print("Documents, bytes of text and texts are not shown: nothing tells the tokenizer.")
        return 0
    bytes_of = tokenizer.token_bytes()
    lengths: list[npt.NDArray[np.int64]] = []
    text_bytes = total = disk_bytes = 0
    for split in get_args(Split):
        ends, end = [np.zeros(0, np.int64)], 0
        for shard in inside.splits[split]:
            for begin, block in _blocks(shard):
                if (highest := int(block.max())) >= tokenizer.vocab_size:
                    raise BadInput(
                        f"{folder} holds the token {highest}, beyond the vocabulary of "
                        f"{tokenizer.name} ({tokenizer.vocab_size:,}), so it is damaged or of "
                        "another tokenizer; --verify names the file."
                    )
                ends.append(np.flatnonzero(block == tokenizer.end_of_text) + end + begin)
                if bytes_of is not None:
                    text_bytes += int(bytes_of[block].sum())
            end += shard.size
            disk_bytes += shard.nbytes
        found = np.concatenate(ends)
        lengths.append(_lengths(found, end))
        total += end
        print(f"{split:5} {end:>15,} tokens {found.size:>12,} documents")
    all_lengths = np.concatenate(lengths)
    if not all_lengths.size:
        print("Lengths and documents are not shown: there is no end-of-text token.")
        return 0
    if bytes_of is None:
        print("The bytes of text are not counted: a token of this tokenizer has none of its own.")
    else:
        print(
            f"text  {text_bytes:>15,} bytes, {text_bytes / (total - all_lengths.size or 1):.2f} a "
            f"token; a byte of text takes {disk_bytes / max(text_bytes, 1):.2f} bytes on disk"
        )
    print("\ntokens in a document")
    for line in _histogram(all_lengths):
        print(line)
    for text in _some_documents(inside.splits, tokenizer, seed):
        print(f"\n--- a document\n{text}")
    return 0


def _blocks(tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
    """Where each block begins, and its tokens."""
    for begin in range(0, tokens.size, _BLOCK_TOKENS):
        yield begin, tokens[begin : begin + _BLOCK_TOKENS]


def _lengths(ends: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.int64]:
    """Tokens of each document, by the places of the end-of-text tokens in a split.

    Ours, llm.c and build-nanogpt put that token before a document, nanoGPT behind it: where the
    split does not begin with one, they are behind, and a rest after the last one is left out.
    """
    if not ends.size:
        return ends
    edges = (ends, [tokens]) if ends[0] == 0 else ([-1], ends)
    lengths: npt.NDArray[np.int64] = np.diff(np.concatenate(edges)) - 1
    return lengths


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
    splits: Mapping[Split, Sequence[Tokens]], tokenizer: Tokenizer, seed: int
) -> Iterator[str]:
    """The beginnings of a few documents, drawn at random."""
    chance = np.random.default_rng(seed)
    shards = [shard for split in splits.values() for shard in split]
    for _ in range(_SHOWN_DOCUMENTS):
        tokens = shards[chance.integers(len(shards))]
        ends = np.flatnonzero(tokens[:-1] == tokenizer.end_of_text)
        if not ends.size:
            continue
        begin = int(ends[chance.integers(ends.size)]) + 1
        shown = tokens[begin : begin + _SHOWN_CHARACTERS].tolist()
        if tokenizer.end_of_text in shown:
            shown = shown[: shown.index(tokenizer.end_of_text)]
        text = tokenizer.decode(shown)
        yield text[:_SHOWN_CHARACTERS] + ("..." if len(text) > _SHOWN_CHARACTERS else "")


REPAIRED = ".repaired"


def repair(folder: Path, workers: int) -> int:
    """Make every damaged or missing shard again, just as it was; the exit status.

    Raises:
        BadInput: if there is no manifest, or it does not tell where its shards begin.
        RunFailed: if the source gives other tokens than it did; the shard stays as it is.
    """
    manifest = read_manifest(folder)
    damaged = [s for s in manifest.shards if damage_of(folder, s, manifest) is not None]
    for shard in damaged:
        print(f"making {shard.file} again", file=sys.stderr, flush=True)
        _make_again(folder, manifest, shard, workers)
    print(f"{len(damaged)} of {len(manifest.shards)} shards were made again in {folder}.")
    return 0


def _make_again(folder: Path, manifest: Manifest, shard: Shard, workers: int) -> None:
    settings = manifest.settings
    if settings is None or shard.begins is None:
        raise BadInput(
            f"{folder / 'manifest.json'} does not tell where in the source {shard.file} begins; "
            "repair the folder it was joined from, or delete it and fetch it again."
        )
    aside = folder / REPAIRED
    order = Order(
        out=aside,
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
    as_if = manifest.model_copy(
        update={
            "shards": (),
            "total_tokens": 0,
            "complete": False,
            "settings": settings.model_copy(update={"val_tokens": 0, "shard_tokens": shard.tokens}),
        }
    )
    try:
        earlier = EarlierOutput(aside, as_if, False, (), shard.begins)
        with crew_of(order) as crew:
            made = prepare(order, lambda _: None, crew, earlier)
        if [new.sha256 for new in made.shards] != [shard.sha256]:
            raise RunFailed(
                f"{manifest.dataset} gives other tokens for {shard.file} than it did; its files "
                "or the tokenizer have changed."
            )
        (aside / made.shards[0].file).replace(folder / shard.file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

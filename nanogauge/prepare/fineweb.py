"""From a text dataset on the Hugging Face hub to token shards, streamed: nothing is kept in memory
but a few batches of documents.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from nanogauge.prepare.shards import (
    TOKEN_BYTES,
    Manifest,
    Origin,
    ShardWriter,
    Tokens,
    refuse_filled,
)

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped,unused-ignore]
    import tiktoken

BATCH_DOCUMENTS = 512
"""documents that are tokenised at once; about 2 MB of text"""
TOKENIZER = "gpt2"
TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Order:
    """What to prepare, and where to."""

    out: Path
    tokens: int
    """training tokens"""
    val_tokens: int
    """least validation tokens; the document that reaches them is kept whole"""
    shard_tokens: int
    dataset: str
    """name of a dataset repository on the hub, or a local folder"""
    config: str
    """configuration of that dataset"""
    workers: int
    """threads that tokenise"""


def prepare(order: Order, report: Callable[[int, int], None]) -> Manifest:
    """Write the shards of an order: first validation, then training, disjoint by document.

    The last training document is cut where the training tokens are reached; there are fewer of
    them where the dataset ends before. `report` is called after each document with the documents
    and the tokens (of both splits) so far.

    Raises:
        BadInput: before anything is written, if the folder is filled or cannot be written, the
            disk is too small, or there is no such dataset; and if the dataset ends before the
            training tokens begin.
        RunFailed: if the download breaks off or the disk fills up; finished shards stay.
    """
    _make_folder(order)
    encoding = _load_encoding()
    texts, revision = _open_dataset(order.dataset, order.config)
    origin = Origin(
        tokenizer=TOKENIZER,
        vocab_size=encoding.n_vocab,
        end_of_text=encoding.eot_token,
        dataset=order.dataset,
        dataset_config=order.config,
        revision=revision,
    )
    writer = ShardWriter(order.out, origin, shard_tokens=order.shard_tokens)
    written = writer.tokens
    try:
        with writer:
            for number, document in enumerate(_tokenise(texts, encoding, order.workers), start=1):
                if written["val"] < order.val_tokens:
                    writer.write("val", document)
                else:
                    writer.write("train", document[: order.tokens - written["train"]])
                report(number, written["val"] + written["train"])
                if written["train"] == order.tokens:
                    break
            if not written["train"]:
                raise BadInput(
                    f"{order.dataset} {order.config} ends after {written['val']:,} tokens, which "
                    "leaves none to train on; give a smaller --val-tokens."
                )
    except RunFailed as error:
        raise RunFailed(f"{error}; {_what_stays(order.out, writer.manifest)}") from error
    except OSError as error:  # the source has made its own errors RunFailed: this is the disk
        raise RunFailed(
            f"cannot write to {order.out}: {error.strerror}; "
            f"{_what_stays(order.out, writer.manifest)}"
        ) from error
    return writer.manifest


def _what_stays(out: Path, manifest: Manifest) -> str:
    if not manifest.tokens("train"):
        return f"no training shard was finished: delete {out} and run the same command again."
    return (
        f"{len(manifest.shards)} finished shards ({manifest.tokens('train'):,} training tokens) "
        f"stay in {out}: train on those, or delete that folder and run the same command again."
    )


def _make_folder(order: Order) -> None:
    refuse_filled(order.out)
    needed_bytes = TOKEN_BYTES * (order.tokens + order.val_tokens)
    try:
        there = next(path for path in (order.out, *order.out.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(there).free
        if needed_bytes > free_bytes:
            raise BadInput(
                f"{order.tokens + order.val_tokens:,} tokens need {needed_bytes / 1e9:,.1f} GB, "
                f"and {order.out} has {free_bytes / 1e9:,.1f} GB free; make room, give fewer "
                "--tokens, or an --out on another disk."
            )
        order.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=order.out).close()
    except OSError as error:
        raise BadInput(
            f"cannot write to {order.out}: {error.strerror}; give another --out."
        ) from None


def _load_encoding() -> tiktoken.Encoding:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(TOKENIZER)
    except (OSError, ValueError) as error:  # no network; a download that was cut
        raise RunFailed(
            f"the {TOKENIZER} vocabulary could not be downloaded ({type(error).__name__}); check "
            "the network, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
        ) from error
    assert encoding.n_vocab <= 2**16, "tokens are stored as uint16"
    return encoding


def _open_dataset(dataset: str, config: str) -> tuple[Iterator[list[str]], str | None]:
    """The dataset's training texts, in batches, and the commit they are of."""
    import datasets
    from huggingface_hub.utils.logging import set_verbosity

    # Retries are told by `datasets`; the hub's client would tell each of them six times more.
    set_verbosity(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(dataset, name=config)
        stream = builder.as_streaming_dataset("train")
        # Only some file formats tell their columns; of the others the first row does.
        columns = stream.column_names or list(next(iter(stream), {}))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"cannot open the dataset {dataset} {config}: {_short(error)}; "
            "give --dataset and --name as the hub lists them."
        ) from None
    except _client_errors() as error:
        raise RunFailed(
            f"cannot reach the dataset {dataset} ({_short(error)}); nothing was written: "
            "check the network, then run the same command again."
        ) from error
    if TEXT_COLUMN not in columns:
        raise BadInput(
            f"the dataset {dataset} has no column {TEXT_COLUMN!r}, only {', '.join(columns)}; "
            "give a --dataset of texts."
        )
    origin = builder.config.data_files["train"].origin_metadata[0]
    revision = origin[1] if len(origin) == 2 else None  # local files have a time in its place
    return _texts(stream, dataset), revision


def _texts(stream: datasets.IterableDataset, dataset: str) -> Iterator[list[str]]:
    """The texts in batches; a row without text is no document."""
    try:
        for batch in stream.select_columns(TEXT_COLUMN).iter(BATCH_DOCUMENTS):
            yield [text for text in batch[TEXT_COLUMN] if text]
    except _client_errors() as error:
        raise RunFailed(f"the download of {dataset} broke off ({_short(error)})") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the client raises for a network, a hub or a file that fails."""
    import pyarrow  # type: ignore[import-untyped,unused-ignore]

    # The HTTP library's name changes with the client's version; the client tells which it is.
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return OSError, httpx.HTTPError, pyarrow.ArrowException


def _tokenise(
    batches: Iterator[list[str]], encoding: tiktoken.Encoding, workers: int
) -> Iterator[Tokens]:
    """Tokenise documents, in order; one batch is tokenised while the next is downloaded."""

    def encode(texts: list[str]) -> list[Tokens]:
        encoded = encoding.encode_ordinary_batch(texts, num_threads=workers)
        return [np.array([encoding.eot_token, *tokens], dtype=np.uint16) for tokens in encoded]

    ahead: Future[list[Tokens]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for texts in batches:
            begun = pool.submit(encode, texts)
            if ahead is not None:
                yield from ahead.result()
            ahead = begun
        if ahead is not None:
            yield from ahead.result()


def _short(error: BaseException) -> str:
    """The first line of a message, or the kind of an error that has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

"""Worker processes that read and tokenize units, the pieces of source files."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.documents import Unit, read_documents
from trainer.data.hub import with_retries
from trainer.data.manifest import Tokens, token_dtype
from trainer.data.tokenizer import Tokenizer, load_tokenizer

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Start method of workers; a forked worker inherits imported modules and the tokenizer."""

_tokenizer: Tokenizer
"""The tokenizer of this worker process."""


@dataclass(frozen=True)
class TokenizedUnit:
    tokens: Tokens
    starts: npt.NDArray[np.int64]
    """Index of each document's first token, followed by the number of tokens."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""


class WorkerPool(ProcessPoolExecutor):
    """Worker processes that call `tokenize_unit`; a context manager that terminates them.

    On Linux they are forked at once, so create the pool before any thread is started. `arguments` are those of
    load_tokenizer.
    """

    def __init__(self, size: int, arguments: tuple[str, str]) -> None:
        load = partial(load_tokenizer, *arguments)
        self.size = size
        self.tokenizer = tokenizer = load()
        given = (lambda: tokenizer) if START_METHOD == "fork" else load
        super().__init__(size, multiprocessing.get_context(START_METHOD), _start_worker, (given,))
        self.submit(int)

    def __exit__(self, *_: object) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        self.shutdown(cancel_futures=True)


def _start_worker(load: Callable[[], Tokenizer]) -> None:
    global _tokenizer  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = load()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def tokenize_unit(unit: Unit, column: str) -> TokenizedUnit:
    """Return the tokens of a unit's documents; called in a worker process.

    Raises:
        BadInput: if the source is damaged, or has no text in `column`.
        RunFailed: if it cannot be fetched.
    """
    texts: Iterable[str] = read_documents(unit, column)
    if unit.remote:
        texts = with_retries(unit.name, lambda: list(read_documents(unit, column)), f"the hub refuses {unit.name}")
    dtype = token_dtype(_tokenizer.vocab_size)
    documents, text_bytes = [np.zeros(0, dtype)], 0
    for text in texts:
        documents.append(_tokenizer.encode(text).astype(dtype))
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
    starts = np.cumsum([tokens.size for tokens in documents])
    tokens: Any = np.concatenate(documents)
    return TokenizedUnit(tokens, starts, text_bytes)

"""A worker: reads its own units of the source, tokenises them and leaves their pieces on disk.

Between the processes go only units and counts, as JSON; no text and no token does.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Damaged, Unit, documents, kind_of
from trainer.data.pieces import PieceWriter, dtype_of, piece_path
from trainer.data.splitting import PART
from trainer.data.tokenizer import Text, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_CHARACTERS = 2**16
DAMAGED_TRIES = 4
"""times that a unit is fetched before its source counts as damaged"""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know of the order; the rest is in the units."""

    tokenizer: str
    pattern: str
    column: str
    one_at_a_time: AbstractContextManager[Any]
    """held while a huge document is in memory"""


@dataclass(frozen=True)
class Vocabulary:
    """What a worker tells of the tokenizer it has loaded."""

    vocab_size: int
    end_of_text: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """What is the same for all units of a worker."""

    tokenizer: Tokenizer
    folder: Path
    parent: int
    column: str
    one_at_a_time: AbstractContextManager[Any]


def work(
    connection: Connection, others: list[Connection], parent: int, tells: bool, order: Work
) -> None:
    """Do units until the other end of the connection is closed.

    Args:
        connection: gives a folder, then units, and takes what came of each.
        others: ends of connections that this process inherited and must not hold open.
        parent: process that started this one.
        tells: whether to say what the tokenizer is; one of all workers does.
        order: what is the same for all units.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes us down
    for other in others:
        other.close()
    try:
        try:
            tokenizer = load_tokenizer(order.tokenizer, order.pattern)
        except (BadInput, RunFailed) as error:
            failed = {"no tokenizer": str(error), "bad": isinstance(error, BadInput)}
            connection.send_bytes(json.dumps(failed).encode())
            return
        if tells:
            told = Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.sha256())
            connection.send_bytes(json.dumps(asdict(told)).encode())
        folder = Path(connection.recv_bytes().decode())
        task = Task(tokenizer, folder, parent, order.column, order.one_at_a_time)
        for loaded in _ahead(_units(connection), connection, order.column):
            connection.send_bytes(json.dumps(_answer(loaded, task)).encode())
    except (EOFError, OSError):
        pass  # the parent is gone


def _units(connection: Connection) -> Iterator[Unit]:
    while True:
        yield Unit(**json.loads(connection.recv_bytes()))


Loaded = tuple[Unit, "Future[pq.ParquetFile | None]"]


def _ahead(units: Iterator[Unit], connection: Connection, column: str) -> Iterator[Loaded]:
    """Units and what was fetched for them: that of the next one while this one is tokenised."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def load(unit: Unit) -> Loaded:
            return unit, pool.submit(_open_parquet, unit, column)

        current = load(next(units))
        while True:
            following = load(next(units)) if connection.poll() else None
            yield current
            current = following if following is not None else load(next(units))


_opened: dict[str, pq.ParquetFile] = {}


def _open_parquet(unit: Unit, column: str) -> pq.ParquetFile | None:
    """The open file of a unit, with what it needs of a remote one in memory."""
    if kind_of(unit.name)[0] != "parquet":
        return None
    from trainer.data.parquet import open_local, open_remote

    if unit.remote:
        return open_remote(unit, column)
    if unit.path not in _opened:
        _opened.clear()
        _opened[unit.path] = open_local(unit.path)
    return _opened[unit.path]


def _answer(loaded: Loaded, task: Task) -> dict[str, Any]:
    unit, file = loaded
    answer: dict[str, Any] = {"file": unit.file, "unit": unit.index, "retries": 0}
    while True:
        try:
            _do(unit, file.result(), task)
            return answer
        except Damaged as error:
            answer["retries"] += 1
            if not unit.remote or answer["retries"] == DAMAGED_TRIES:
                return answer | {"failed": str(error), "bad": not unit.remote}
            # What came was not what the file holds: it is dropped and fetched again.
            file = Future()
            try:
                file.set_result(_open_parquet(unit, task.column))
            except (BadInput, RunFailed) as again:
                file.set_exception(again)
        except BadInput as error:
            return answer | {"failed": str(error), "bad": True}
        except RunFailed as error:
            return answer | {"failed": str(error), "bad": False}
        except OSError as error:
            return answer | {"disk": [error.errno, error.strerror]}


def _do(unit: Unit, file: pq.ParquetFile | None, task: Task) -> None:
    tokenizer = task.tokenizer
    path = piece_path(task.folder, unit.file, unit.index)
    piece = PieceWriter(path, dtype_of(tokenizer.vocab_size))
    try:
        _write(documents(unit, task.column, file, task.one_at_a_time), tokenizer, piece)
        if os.getppid() != task.parent:
            raise EOFError  # it was killed, and another call may be at work in its folder
        piece.finish()
    except UnicodeDecodeError as error:
        piece.drop()
        raise Damaged(f"{unit.name} holds a text that is no UTF-8: {error}.") from None
    except BaseException:
        piece.drop()
        raise


def _write(texts: Iterator[Text], tokenizer: Tokenizer, piece: PieceWriter) -> None:
    """Tokenise documents, short ones many at a time, long ones in parts."""
    batch: list[str] = []
    held = 0
    for text in texts:
        if isinstance(text, str) and len(text) <= PART:
            batch.append(text)
            held += len(text)
            piece.text_bytes += _utf8_bytes(text)
            if held < _BATCH_CHARACTERS:
                continue
        if batch:
            piece.add_documents(tokenizer.encode(batch), tokenizer.end_of_text)
            batch, held = [], 0
        if isinstance(text, str) and len(text) <= PART:
            continue
        piece.begin_document(tokenizer.end_of_text)
        for part in tokenizer.parts(text):
            piece.text_bytes += _utf8_bytes(part)
            piece.go_on(tokenizer.encode([part])[1:])
    if batch:
        piece.add_documents(tokenizer.encode(batch), tokenizer.end_of_text)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))

"""The workers, as the process that has them sees them: units go out, counts come back."""

from __future__ import annotations

import json
import os
import signal
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Damaged, Unit, documents, kind_of
from trainer.data.tokenizer import PART, Text, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import pyarrow.parquet as pq
import multiprocessing
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

_FOOTER = struct.Struct("<8sQQQI")
_MAGIC = b"ngpiece1"
_BUFFER_TOKENS = 2**17
_BLOCK_BYTES = 2**22

TokenDtype = np.dtype[np.uint16] | np.dtype[np.uint32]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def dtype_of(vocab_size: int) -> TokenDtype:
    """How the tokens of a vocabulary lie on disk: in two bytes where they can."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def piece_path(folder: Path, file: int, unit: int) -> Path:
    """Where the piece of a unit is, or will be."""
    return folder / f"{file:05d}_{unit:07d}.piece"


class PieceWriter:
    """Writes one piece; nothing is there under its name before `finish`."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._aside.open("wb")
        self._buffer = cast(Tokens, np.empty(_BUFFER_TOKENS, dtype))
        self._held = 0
        self._crc = 0
        self._lengths: list[npt.NDArray[np.int64]] = []
        self.tokens = 0
        self.text_bytes = 0
        """of the documents, as UTF-8; the caller counts them"""

    def begin_document(self, end_of_text: int) -> None:
        """Begin a document that is written in parts."""
        self.add_documents(np.array([end_of_text], np.uint32), end_of_text)

    def go_on(self, tokens: npt.NDArray[np.uint32]) -> None:
        """Go on with the last document; tokens lie within the vocabulary."""
        self._lengths[-1][-1] += tokens.size
        self._append(tokens)

    def add_documents(self, tokens: npt.NDArray[np.uint32], end_of_text: int) -> None:
        """Add whole documents: each begins with the end-of-text token, which is nowhere else."""
        starts = np.flatnonzero(tokens == end_of_text)
        assert starts.size and starts[0] == 0
        self._lengths.append(np.diff(starts, append=tokens.size))
        self._append(tokens)

    def _append(self, tokens: npt.NDArray[np.uint32]) -> None:
        self.tokens += tokens.size
        while tokens.size:
            part = tokens[: _BUFFER_TOKENS - self._held]
            self._buffer[self._held : self._held + part.size] = part
            self._held += part.size
            tokens = tokens[part.size :]
            if self._held == _BUFFER_TOKENS:
                self._flush()

    def _flush(self) -> None:
        data = self._buffer[: self._held].data
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)
        self._held = 0

    def finish(self) -> None:
        with self._file as file:
            self._flush()
            lengths = np.concatenate((*self._lengths, np.zeros(0, np.int64))).astype("<i8")
            file.write(lengths.data)
            file.write(_FOOTER.pack(_MAGIC, self.tokens, lengths.size, self.text_bytes, self._crc))
        self._aside.replace(self._path)

    def drop(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Piece:
    path: Path
    dtype: TokenDtype
    tokens: int
    text_bytes: int
    starts: npt.NDArray[np.int64]
    """where each document begins, and behind the last one the number of tokens"""

    @property
    def documents(self) -> int:
        return self.starts.size - 1

    def read(self, file: BinaryIO, begin: int, end: int) -> Tokens:
        """The tokens from begin to end, of the piece's open file."""
        file.seek(begin * self.dtype.itemsize)
        data = file.read((end - begin) * self.dtype.itemsize)
        return cast(Tokens, np.frombuffer(data, self.dtype))


def open_piece(path: Path, dtype: TokenDtype) -> Piece:
    """Open a piece that a worker has just finished.

    Raises:
        ValueError: if it is cut.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        tokens, text_bytes, _, lengths = _read_end(file, dtype)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Piece(path, dtype, tokens, text_bytes, starts)


def is_whole(path: Path, dtype: TokenDtype) -> bool:
    """Whether a piece that was left by an earlier call is there and undamaged."""
    try:
        with path.open("rb") as file:
            tokens, _, expected, _ = _read_end(file, dtype)
            file.seek(0)
            left, crc = tokens * dtype.itemsize, 0
            while left:
                data = file.read(min(left, _BLOCK_BYTES))
                crc = zlib.crc32(data, crc)
                left -= len(data)
    except (OSError, ValueError):
        return False
    return crc == expected


def _read_end(file: BinaryIO, dtype: TokenDtype) -> tuple[int, int, int, npt.NDArray[np.int64]]:
    size = file.seek(0, os.SEEK_END)
    if size < _FOOTER.size:
        raise ValueError("no footer")
    file.seek(size - _FOOTER.size)
    magic, tokens, documents, text_bytes, crc = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != _MAGIC or size != tokens * dtype.itemsize + documents * 8 + _FOOTER.size:
        raise ValueError("no footer")
    file.seek(tokens * dtype.itemsize)
    lengths = np.frombuffer(file.read(documents * 8), "<i8")
    if lengths.sum() != tokens:
        raise ValueError("lengths that do not fit")
    return tokens, text_bytes, crc, lengths


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
    from trainer.data.documents import open_local, open_remote

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


_PARENT_BYTES = 250e6
_WORKER_BYTES = 170e6
_HUGE_BYTES = 1150e6
"""for one document of 200 MB, which one worker has at a time; all measured by bench/prepare.py"""

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""how workers start; a forked one inherits what is imported, and every open connection"""

AT_ONCE = 2
"""units that a worker has: one that it tokenises, one that it fetches"""


def workers_within(memory_bytes: float, wanted: int) -> int:
    """How many workers fit into the memory; one in any case."""
    room = memory_bytes - _PARENT_BYTES - _HUGE_BYTES
    return max(1, min(wanted, int(room // _WORKER_BYTES)))


class Crew:
    """Processes that do units; a context manager that ends them.

    On Linux they are forked, so make the crew before anything starts a thread. Elsewhere they
    begin anew, and import what they need. They load the tokenizer meanwhile.
    """

    def __init__(self, size: int, tokenizer: str, pattern: str, column: str) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        # Held on to: a spawned worker finds its lock by a name that goes with the last reference.
        self._order = Work(tokenizer, pattern, column, context.Lock())
        pairs = [context.Pipe() for _ in range(size)]
        self._connections: list[Connection] = [ours for ours, _ in pairs]
        self._processes = []
        for number, (_, theirs) in enumerate(pairs):
            others = [end for pair in pairs for end in pair if end is not theirs]
            if START_METHOD == "spawn":
                others = []  # nothing is inherited
            self._processes.append(
                context.Process(
                    target=work,
                    args=(theirs, others, os.getpid(), number == 0, self._order),
                    name=f"worker {number}",
                )
            )
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()
        self.size = size
        self._load = dict.fromkeys(self._connections, 0)
        self.failures: dict[tuple[int, int], Exception] = {}
        """by file and unit: BadInput for a source that is not what it should be, RunFailed for one
        that cannot be fetched, OSError for a piece that cannot be written"""
        self.retries = 0
        """times that something damaged came and was fetched again"""

    def vocabulary(self) -> Vocabulary:
        """What the tokenizer is; to be asked once, before `begin`.

        Raises:
            BadInput, RunFailed: as `load_tokenizer`.
        """
        answer = self._receive(self._connections[0])
        return Vocabulary(**answer)

    def begin(self, folder: Path) -> None:
        """Tell the folder for the pieces, which exists."""
        for connection in self._connections:
            connection.send_bytes(str(folder).encode())

    @property
    def busy(self) -> bool:
        return any(self._load.values())

    @property
    def has_room(self) -> bool:
        return min(self._load.values()) < AT_ONCE

    def give(self, unit: Unit) -> None:
        """Give a unit to the worker that has the fewest.

        Raises:
            RunFailed: if that worker was killed.
        """
        connection = min(self._load, key=self._load.__getitem__)
        self._load[connection] += 1
        try:
            connection.send_bytes(json.dumps(asdict(unit)).encode())
        except OSError:
            raise self._died(connection) from None

    def done(self, seconds: float) -> list[tuple[int, int]]:
        """Wait for units to be done, at most so long: file and unit of each, `failures` apart.

        Raises:
            RunFailed: if a worker was killed.
        """
        finished = []
        for connection in wait(self._connections, seconds):
            assert isinstance(connection, Connection)
            answer = self._receive(connection)
            self._load[connection] -= 1
            self.retries += answer["retries"]
            unit = (answer["file"], answer["unit"])
            if "disk" in answer:
                self.failures[unit] = OSError(*answer["disk"])
            elif "failed" in answer:
                kind = BadInput if answer["bad"] else RunFailed
                self.failures[unit] = kind(answer["failed"])
            else:
                finished.append(unit)
        return finished

    def _receive(self, connection: Connection) -> dict[str, Any]:
        """What a worker says: an answer, or that it has no tokenizer, which is raised."""
        try:
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise self._died(connection) from None
        if "no tokenizer" in answer:
            raise (BadInput if answer["bad"] else RunFailed)(answer["no tokenizer"])
        return answer

    def _died(self, connection: Connection) -> RunFailed:
        process = self._processes[self._connections.index(connection)]
        process.join(1)
        code = process.exitcode
        why = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        memory = "; was the memory full? --workers 1 needs less" if code == -9 else ""
        return RunFailed(f"a worker ended {why}{memory}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for connection in self._connections:
            with suppress(OSError):
                connection.close()
        for process in self._processes:
            process.join()

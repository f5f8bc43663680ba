"""Worker processes that read and tokenize units, and the pool that the parent drives them with.

A unit is a piece of a source file, sent to a worker as JSON over a pipe. The worker writes its tokens to a file, the
unit's segment.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Damaged, Unit, format_of, read_documents
from trainer.data.manifest import token_dtype
from trainer.data.segments import SegmentWriter, segment_path
from trainer.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import pyarrow.parquet as pq

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Start method of workers; a forked worker inherits imported modules and open connections."""
UNITS_PER_WORKER = 2
"""Units assigned to a worker at a time: it tokenizes one and fetches the next meanwhile."""
DAMAGED_TRIES = 4
"""Number of times a unit is fetched before its source counts as damaged."""


@dataclass(frozen=True)
class _WorkerState:
    tokenizer: Tokenizer
    folder: Path
    column: str


def run_worker(
    connection: Connection, inherited: list[Connection], tokenizer: Tokenizer | tuple[str, str, str], column: str
) -> None:
    """Tokenize units received from the parent, and send back the result of each.

    The first message is the folder for segments; the loop ends when the parent disconnects. `inherited` are other
    workers' connections, which this process closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the workers
    for other in inherited:
        other.close()
    try:
        if isinstance(tokenizer, tuple):  # spawned
            tokenizer = load_tokenizer(*tokenizer)
        state = _WorkerState(tokenizer, Path(connection.recv_bytes().decode()), column)
        for loaded in _prefetch(_receive_units(connection), connection, column):
            connection.send_bytes(json.dumps(_process(loaded, state)).encode())
    except (EOFError, OSError):
        pass  # the parent has ended


def _receive_units(connection: Connection) -> Iterator[Unit]:
    while True:
        yield Unit(**json.loads(connection.recv_bytes()))


LoadedUnit = tuple[Unit, "Future[pq.ParquetFile | None]"]


def _prefetch(units: Iterator[Unit], connection: Connection, column: str) -> Iterator[LoadedUnit]:
    """Yield units with their open files; fetch the next while the current is tokenized."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def load(unit: Unit) -> LoadedUnit:
            return unit, pool.submit(_open_parquet, unit, column)

        current = load(next(units))
        while True:
            following = load(next(units)) if connection.poll() else None
            yield current
            current = following if following is not None else load(next(units))


_local_files: dict[str, pq.ParquetFile] = {}
"""The last opened local Parquet file, by path."""


def _open_parquet(unit: Unit, column: str) -> pq.ParquetFile | None:
    """Open the Parquet file of a unit; None for other formats."""
    if format_of(unit.name)[0] != "parquet":
        return None
    from trainer.data.parquet import open_local, open_remote

    if unit.remote:
        return open_remote(unit, column)
    if unit.path not in _local_files:
        _local_files.clear()
        _local_files[unit.path] = open_local(unit.path)
    return _local_files[unit.path]


def _process(loaded: LoadedUnit, state: _WorkerState) -> dict[str, Any]:
    """Write the segment of a unit and return the result; refetch a damaged remote unit."""
    unit, file = loaded
    result: dict[str, Any] = {"file": unit.file, "unit": unit.index, "retries": 0}
    while True:
        try:
            _write_segment(unit, file.result(), state)
            return result
        except Damaged as error:
            result["retries"] += 1
            if not unit.remote or result["retries"] == DAMAGED_TRIES:
                return result | {"failed": str(error), "bad": not unit.remote}
            file = Future()
            try:
                file.set_result(_open_parquet(unit, state.column))
            except (BadInput, RunFailed) as reopening:
                file.set_exception(reopening)
        except (BadInput, RunFailed) as error:
            return result | {"failed": str(error), "bad": isinstance(error, BadInput)}
        except OSError as error:
            return result | {"disk": [error.errno, error.strerror]}


def _write_segment(unit: Unit, file: pq.ParquetFile | None, state: _WorkerState) -> None:
    tokenizer = state.tokenizer
    path = segment_path(state.folder, unit.file, unit.index)
    segment = SegmentWriter(path, token_dtype(tokenizer.vocab_size))
    try:
        _tokenize(read_documents(unit, state.column, file), tokenizer, segment)
        segment.finish()
    except UnicodeDecodeError as error:
        raise Damaged(f"{unit.name} holds a text that is not UTF-8: {error}.") from None
    finally:
        segment.close()


def _tokenize(texts: Iterator[str], tokenizer: Tokenizer, segment: SegmentWriter) -> None:
    for text in texts:
        segment.add_document(tokenizer.encode(text))
        segment.text_bytes += len(text.encode("utf-8", "surrogatepass"))


class WorkerPool:
    """Worker processes; a context manager that terminates them.

    On Linux they are forked, so create the pool before any thread is started. Elsewhere they are spawned. `arguments`
    are those of load_tokenizer.
    """

    def __init__(self, size: int, arguments: tuple[str, str, str], column: str) -> None:
        self.tokenizer = load_tokenizer(*arguments)
        given = self.tokenizer if START_METHOD == "fork" else arguments
        context: Any = multiprocessing.get_context(START_METHOD)
        pairs = [context.Pipe() for _ in range(size)]
        self._connections: list[Connection] = [ours for ours, _ in pairs]
        self._processes = []
        for number, (_, theirs) in enumerate(pairs):
            inherited = []
            if START_METHOD == "fork":
                inherited = [end for pair in pairs for end in pair if end is not theirs]
            self._processes.append(
                context.Process(target=run_worker, args=(theirs, inherited, given, column), name=f"worker {number}")
            )
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()
        self.size = size
        self._load = dict.fromkeys(self._connections, 0)
        self.failures: dict[tuple[int, int], Exception] = {}
        """Exception by `Unit.key`: BadInput for a bad source, RunFailed for a failed download, OSError for a segment
        that cannot be written."""
        self.retries = 0
        """Damaged units that were fetched again."""

    def start(self, folder: Path) -> None:
        """Send the workers the existing folder that they write segments to."""
        for connection in self._connections:
            connection.send_bytes(str(folder).encode())

    @property
    def busy(self) -> bool:
        return any(self._load.values())

    @property
    def has_room(self) -> bool:
        return min(self._load.values()) < UNITS_PER_WORKER

    def submit(self, unit: Unit) -> None:
        """Assign a unit to the least loaded worker; raise RunFailed if it was killed."""
        connection = min(self._load, key=self._load.__getitem__)
        self._load[connection] += 1
        try:
            connection.send_bytes(json.dumps(asdict(unit)).encode())
        except OSError:
            raise self._worker_ended(connection) from None

    def wait_for_units(self, seconds: float) -> list[tuple[int, int]]:
        """Wait at most `seconds` and return the keys of completed units; see `failures` for others.

        Raises:
            RunFailed: if a worker was killed.
        """
        completed = []
        for connection in wait(self._connections, seconds):
            assert isinstance(connection, Connection)
            result = self._receive(connection)
            self._load[connection] -= 1
            self.retries += result["retries"]
            unit = (result["file"], result["unit"])
            if "disk" in result:
                self.failures[unit] = OSError(*result["disk"])
            elif "failed" in result:
                kind = BadInput if result["bad"] else RunFailed
                self.failures[unit] = kind(result["failed"])
            else:
                completed.append(unit)
        return completed

    def _receive(self, connection: Connection) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise self._worker_ended(connection) from None
        return message

    def _worker_ended(self, connection: Connection) -> RunFailed:
        process = self._processes[self._connections.index(connection)]
        process.join(1)
        code = process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        memory = "; was the memory full? --workers 1 needs less" if code == -9 else ""
        return RunFailed(f"a worker ended {how}{memory}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for process in self._processes:
            process.terminate()
        for connection in self._connections:
            with suppress(OSError):
                connection.close()
        for process in self._processes:
            process.join()

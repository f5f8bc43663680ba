"""The workers, as the process that has them sees them: units go out, counts come back."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Unit
from trainer.data.worker import Vocabulary, Work, work

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

"""One writer for a run folder: a lock that the operating system takes back when its holder dies.

The lock lies on the file .lock in the run folder, which stays there for good: who holds it writes
into it the process, the machine and the moment. A reader asks without waiting and keeps nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nanogauge.errors import BadInput

LOCK_NAME = ".lock"
_PATIENCE_SECONDS = 1.0
"""a reader holds the lock for an instant, and a process that was killed lets go of it in another"""
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""what a file system answers that has no locks"""

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 2**30  # far behind the text: what is locked there nobody else can read

    def _take(descriptor: int, alone: bool) -> None:
        """Lock, or raise OSError at once; Windows has no lock to be shared."""
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(descriptor: int, alone: bool) -> None:
        """Lock, alone or among readers, or raise OSError at once."""
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)


@dataclass(frozen=True)
class RunLock:
    """Held until close(), or until the process ends in whatever way.

    The descriptor is closed in every program that this process starts (PEP 446).
    """

    descriptor: int
    warning: str | None
    """a sentence where the file system has no locks, so that nothing is held; else None"""

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class _Holder:
    """What the last one to hold a lock wrote into its file."""

    pid: int
    host: str
    since_unix: float


def hold(folder: Path) -> RunLock:
    """Become the only writer of a run folder, which must exist.

    Nothing but the lock's own file is touched. Where the file system has no locks the run goes on
    without, and the lock's warning says so.

    Raises:
        BadInput: if another process writes there, with its id and since when.
        OSError: if the lock's file cannot be made.
    """
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    warning = None
    while True:
        try:
            _take(descriptor, alone=True)
            break
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                warning = (
                    f"The file system of {folder} has no locks ({error.strerror}): "
                    "see to it yourself that no second run writes there."
                )
                break
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise _refusal(folder) from None
            time.sleep(0.02)
    holder = {"pid": os.getpid(), "host": platform.node(), "since_unix": time.time()}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(holder).encode() + b"\n")
    return RunLock(descriptor, warning)


def is_held(folder: Path) -> bool | None:
    """Whether a process, this one included, writes to a run folder at this moment.

    Neither waits nor disturbs. None where nobody can tell: there is no lock's file, as in an
    imported run; the file system has no locks; or the folder was copied from another machine, on
    which the run may well go on.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        _take(descriptor, alone=False)
    except OSError as error:
        return None if error.errno in _UNSUPPORTED else True
    finally:
        os.close(descriptor)
    holder = _holder(folder)
    return False if holder is not None and holder.host == platform.node() else None


def refuse_held(folder: Path) -> None:
    """Say at once that a folder is taken, before any work is done for it.

    Raises:
        BadInput: as hold().
    """
    if is_held(folder):
        raise _refusal(folder)


def _holder(folder: Path) -> _Holder | None:
    """Who held a lock last; None where the file does not tell."""
    try:
        values = json.loads((folder / LOCK_NAME).read_bytes())
        return _Holder(int(values["pid"]), str(values["host"]), float(values["since_unix"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refusal(folder: Path) -> BadInput:
    holder = _holder(folder)
    who = "another process"
    if holder is not None:
        since = datetime.fromtimestamp(holder.since_unix).astimezone()
        host = "" if holder.host == platform.node() else f" on {holder.host}"
        who = f"process {holder.pid}{host}, since {since:%Y-%m-%d %H:%M:%S},"
    return BadInput(
        f"{who} trains in {folder} already; wait for it or stop it, "
        "or give this run another --run.name."
    )

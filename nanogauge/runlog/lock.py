"""Lock of a run folder for its only writer; the operating system releases it with the process.

The lock is on the file .lock, which stays in the folder and names the process, machine and time of its last owner.
Readers test it without waiting.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nanogauge.errors import BadInput

LOCK_NAME = ".lock"
_RETRY_SECONDS = 1.0
"""Retry time: a reader locks for an instant, and so may a process that is being killed."""
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system without locks."""


@dataclass(frozen=True)
class RunLock:
    """A lock until close(), or until the process ends.

    Child processes do not inherit the descriptor (PEP 446).
    """

    descriptor: int
    warning: str | None
    """A sentence if the file system has no locks, else None."""

    def close(self) -> None:
        os.close(self.descriptor)


def acquire_lock(folder: Path) -> RunLock:
    """Lock an existing run folder for writing; without locks in the file system, return a warning.

    Raises:
        BadInput: if another process has locked it.
        OSError: if the lock file cannot be created.
    """
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _RETRY_SECONDS
    warning = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                warning = (
                    f"The file system of {folder} has no locks ({error.strerror}): "
                    "make sure that no second run writes there."
                )
                break
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise _locked_by(folder) from None
            time.sleep(0.02)
    owner = {"pid": os.getpid(), "host": platform.node(), "since_unix": time.time()}
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # a full disk: the owner is only for messages
        os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)
    return RunLock(descriptor, warning)


def is_locked(folder: Path) -> bool | None:
    """Return True if a process, possibly this one, has locked a run folder now.

    None if unknown: there is no lock file, as in an imported run; the file system has no locks; or the folder was
    copied from another machine, on which the run may continue.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _UNSUPPORTED else True
    finally:
        os.close(descriptor)
    owner = _owner(folder)
    return False if owner is not None and owner[1] == platform.node() else None


def refuse_locked(folder: Path) -> None:
    """Raise BadInput if another process has locked a run folder, before any work for it."""
    if is_locked(folder):
        raise _locked_by(folder)


def _owner(folder: Path) -> tuple[int, str, float] | None:
    """Return the process, machine and time of the last owner; None if the file is damaged."""
    try:
        values = json.loads((folder / LOCK_NAME).read_bytes())
        return int(values["pid"]), str(values["host"]), float(values["since_unix"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _locked_by(folder: Path) -> BadInput:
    owner = _owner(folder)
    process = "another process"
    if owner is not None:
        pid, host, since_unix = owner
        since = datetime.fromtimestamp(since_unix).astimezone()
        where = "" if host == platform.node() else f" on {host}"
        process = f"process {pid}{where}, since {since:%Y-%m-%d %H:%M:%S},"
    return BadInput(
        f"{process} trains in {folder} already; wait for it or stop it, or give this run another --run.name."
    )

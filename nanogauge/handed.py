"""Files that somebody may have handed over: none may hang the reader, fill the memory, or be
somewhere else than it seems.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path, PureWindowsPath

from nanogauge.errors import BadInput

LARGEST_BYTES = 2**24
"""of a file that is read whole: a configuration, claims, a prediction, a manifest"""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read.

    Raises:
        OSError: if it cannot be opened, or is none: a pipe would wait for its writer, and a device
            has no end.
    """
    # Not every system has pipes among its files, or a difference between text and bytes.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_whole(path: Path, largest_bytes: int = LARGEST_BYTES) -> bytes:
    """The bytes of a small regular file.

    Raises:
        OSError: as open_regular, or if it is larger than that.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > largest_bytes:
            raise OSError(errno.EFBIG, f"it has more than {largest_bytes:,} bytes", str(path))
        return file.read()


def stays_below(name: str) -> bool:
    """Whether a path that a file names leads to a file below that file's own folder."""
    parts = PureWindowsPath(name)  # which also knows drives, and takes / as well as \
    usable = name.isprintable() and parts.name not in ("", "..")
    return usable and not parts.anchor and ".." not in parts.parts


def refuse_to_lead_out(path: Path) -> None:
    """Refuse a link to a file elsewhere: what is read there would be shown and uploaded.

    Raises:
        BadInput: if it is one.
    """
    folder = os.path.realpath(path.parent)
    if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
        raise BadInput(f"{path} is a link that leads out of its folder; put the file itself there.")

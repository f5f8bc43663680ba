"""Files: safe reading of untrusted ones, atomic writes, hashes, and removal of secrets.

An untrusted file may be a pipe, be huge, or link out of its folder. A run folder and its reports
are mailed, uploaded and shown, so texts lose keys, passwords and the home folder on their way to
disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import IO, TextIO, TypeVar

from nanogauge.errors import BadInput

LARGEST_BYTES = 2**24
"""of a file that is read whole: a configuration, claims, a prediction, a manifest"""
KEYS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""environment variables with secret values"""
HIDDEN = "***"
_SHORTEST_KEY = 6
"""characters; a shorter value is not a key and may be part of any word"""
_PASSWORD = re.compile(r"://[^/\s@\"'<>]+@")
"""what an address has in front of its host: user, token, user:password"""
_TOKENS = (re.compile(r"hf_[A-Za-z0-9]{30,}"), re.compile(r"wandb_v\d_[A-Za-z0-9_]{30,}"))
"""formats of the hub and of W&B"""

_Value = TypeVar("_Value")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read.

    Raises:
        OSError: if it cannot be opened or is not a regular file: a pipe would block, and a device
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
    """Return the bytes of a small regular file.

    Raises:
        OSError: as open_regular, or if it is larger than largest_bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > largest_bytes:
            raise OSError(errno.EFBIG, f"it has more than {largest_bytes:,} bytes", str(path))
        return file.read()


def stays_below(name: str) -> bool:
    """Return True if a path named in a file leads to a file below that file's folder."""
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


def make_folder(path: Path) -> None:
    """Create a folder to write into.

    Raises:
        BadInput: if it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"cannot make the folder {path}: {error.strerror}; choose another."
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(f"the folder {path} is not writable; choose another.")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole.

    An existing file under the temporary name is removed first: in an untrusted folder it may be a
    link to another file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            sync_file(file)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_file(file: IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal.

    Raises:
        OSError: as open_regular.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_keys(text: str) -> str:
    """Replace known keys, tokens and passwords in a text by ***."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if len(key) >= _SHORTEST_KEY:
            text = text.replace(key, HIDDEN)
    for token in _TOKENS:
        text = token.sub(HIDDEN, text)
    return _PASSWORD.sub(f"://{HIDDEN}@", text)


def without_secrets(text: str) -> str:
    """Remove keys as without_keys does, and write ~ for the home folder."""
    text = without_keys(text)
    home = str(Path.home())
    for path in {home, os.path.realpath(home)} - {os.sep}:
        if path in text:
            text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-]|\.\w)", "~", text)
    return text


def scrubbed(value: _Value) -> _Value:
    """Remove the secrets from every text in a JSON value; names of fields stay."""
    match value:
        case str():
            return without_secrets(value)  # type: ignore[return-value]
        case dict():
            return {key: scrubbed(one) for key, one in value.items()}  # type: ignore[return-value]
        case list() | tuple():
            return type(value)(scrubbed(one) for one in value)
        case _:
            return value


def from_home(path: str) -> Path:
    """Return the path named in a configuration; ~/ is the user's home folder."""
    begin, _, rest = path.partition("/")
    return Path.home() / rest if begin == "~" else Path(path)


class Scrubber(io.TextIOBase):
    """Text stream that removes secrets from every write before it reaches the stream behind."""

    def __init__(self, behind: TextIO) -> None:
        self._behind = behind

    def write(self, text: str) -> int:
        self._behind.write(without_secrets(text))
        return len(text)

    def flush(self) -> None:
        self._behind.flush()

    def fileno(self) -> int:
        return self._behind.fileno()

    def writable(self) -> bool:
        return True

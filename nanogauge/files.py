"""Safe reading of untrusted files, atomic writes, hashes, and removal of secrets from texts.

An untrusted file may be a pipe, be huge, or link out of its folder. Run folders and reports are shared, so keys,
passwords and the home folder are removed from texts before they are written.
"""

import codecs
import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import tempfile
import tomllib
from functools import cache
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import IO, Any, TextIO, TypeVar

from nanogauge.errors import BadInput

LARGEST_BYTES = 2**24
"""Size limit of read_whole."""
ALERTS_VARIABLE = "NANOGAUGE_ALERTS_URL"
"""Environment variable with the address of a webhook, which is a secret: any holder can post to it."""
KEYS = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", ALERTS_VARIABLE),
    *("TRACKIO_SERVER_URL", "TRACKIO_WRITE_TOKEN", "TRACKIO_WEBHOOK_URL"),
)
"""Environment variables with secret values."""
HIDDEN = "***"
_SHORTEST_KEY = 6
"""Characters; a shorter secret is ignored, as it may be part of any word."""
_PASSWORD = re.compile(r"://[^/\s@\"'<>]+@")
"""User, token or password in front of the host of an address."""
_TOKENS = (re.compile(r"hf_[A-Za-z0-9]{30,}"), re.compile(r"wandb_v\d_[A-Za-z0-9_]{30,}"))
"""Tokens of the Hugging Face hub and of W&B."""

_hidden: set[str] = set()
"""Secret values that this process has read from a configuration."""

_Value = TypeVar("_Value")


@cache
def package_table(name: str) -> dict[str, Any]:
    """Read a TOML file of this package; the caller must not change it."""
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without blocking on a pipe or reading from a device.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
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


def decoded(data: bytes) -> str:
    """Return UTF-8 text of a user without its byte order mark.

    Raises:
        OSError: if it is UTF-16.
        UnicodeDecodeError: if it is not UTF-8.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise OSError(errno.EILSEQ, "it is UTF-16; save it as UTF-8")
    return data.decode("utf-8-sig")


def stays_below(name: str) -> bool:
    """Return True if a path in an untrusted file points below the folder of that file."""
    parts = PureWindowsPath(name)  # also handles drives, and both / and \
    usable = name.isprintable() and parts.name not in ("", "..")
    return usable and not parts.anchor and ".." not in parts.parts


def refuse_outside_link(path: Path) -> None:
    """Reject a symlink out of its folder, since the contents of the file are shown and uploaded."""
    folder = os.path.realpath(path.parent)
    if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
        raise BadInput(f"{path} is a link that leads out of its folder; put the file itself there.")


def make_folder(path: Path) -> None:
    """Create a folder to write into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}; choose another.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(f"the folder {path} is not writable; choose another.")


def obstacle(folder: Path) -> str | None:
    """Return why a folder cannot be made or written, None if it can. Leaves nothing behind."""
    path = folder.absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        return f"nothing can be written to {existing} ({error.strerror})"
    return None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: after a crash it has either its old or its new contents."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # in an untrusted folder it may be a link
        with temporary.open("xb") as file:
            file.write(data)
            sync_file(file)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_file(file: IO[bytes]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hide(secret: str) -> None:
    """Make without_keys replace a secret from now on."""
    _hidden.add(secret)


def without_keys(text: str) -> str:
    """Replace the keys, tokens and passwords in a text by ***."""
    for key in (*_hidden, *(os.environ.get(name, "").strip() for name in KEYS)):
        if len(key) >= _SHORTEST_KEY:
            text = text.replace(key, HIDDEN)
    for token in _TOKENS:
        text = token.sub(HIDDEN, text)
    return _PASSWORD.sub(f"://{HIDDEN}@", text)


def without_secrets(text: str) -> str:
    """Replace keys as without_keys does, and the home folder by ~."""
    text = without_keys(text)
    home = str(Path.home())
    for path in {home, os.path.realpath(home)} - {os.sep}:
        if path in text:
            text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-]|\.\w)", "~", text)
    return text


def scrubbed(value: _Value) -> _Value:
    """Apply without_secrets to every string in a JSON value, except field names."""
    match value:
        case str():
            return without_secrets(value)  # type: ignore[return-value]
        case dict():
            return {key: scrubbed(one) for key, one in value.items()}  # type: ignore[return-value]
        case list() | tuple():
            return type(value)(scrubbed(one) for one in value)
        case _:
            return value


def expand_home(path: str) -> Path:
    """Expand a leading ~/ to the home folder."""
    begin, _, rest = path.partition("/")
    return Path.home() / rest if begin == "~" else Path(path)


class Scrubber(io.TextIOBase):
    """Text stream that applies without_secrets to every write to another stream."""

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

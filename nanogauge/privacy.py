"""What no file that may be handed on should hold: keys, passwords in addresses, the home folder.

A run folder and its reports are mailed, uploaded and shown; texts pass through here on their way to
disk. Only the standard library is imported, as everything that writes imports this.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TextIO, TypeVar

KEYS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""variables of the environment whose values are secret"""
HIDDEN = "***"
_SHORTEST_KEY = 6
"""characters; a shorter value is no key, and may be part of any word"""
_PASSWORD = re.compile(r"://[^/\s@\"'<>]+@")
"""what an address has in front of its host: user, token, user:password"""
_TOKENS = (re.compile(r"hf_[A-Za-z0-9]{30,}"), re.compile(r"wandb_v\d_[A-Za-z0-9_]{30,}"))
"""as the hub and W&B make them, wherever this one was read from"""

Value = TypeVar("Value")


def without_keys(text: str) -> str:
    """A text in which every key, token and password that is known as such is hidden."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if len(key) >= _SHORTEST_KEY:
            text = text.replace(key, HIDDEN)
    for token in _TOKENS:
        text = token.sub(HIDDEN, text)
    return _PASSWORD.sub(f"://{HIDDEN}@", text)


def without_secrets(text: str) -> str:
    """A text without keys, as `without_keys`, and with ~ in place of the user's home folder."""
    text = without_keys(text)
    home = str(Path.home())
    for path in {home, os.path.realpath(home)} - {os.sep}:
        if path in text:
            text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-]|\.\w)", "~", text)
    return text


def scrubbed(value: Value) -> Value:
    """Values as JSON knows them, each text in them without secrets; names of fields stay."""
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
    """The path that a configuration names: one that begins with ~/ lies in the user's home."""
    begin, _, rest = path.partition("/")
    return Path.home() / rest if begin == "~" else Path(path)


class Scrubber(io.TextIOBase):
    """A stream of text whose every write reaches the one behind it without secrets."""

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

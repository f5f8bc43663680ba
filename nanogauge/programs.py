"""Training programs by name: rows of programs.toml."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from nanogauge.runspec import Program


def _read() -> dict[str, Program]:
    text = files("nanogauge").joinpath("programs.toml").read_text(encoding="utf-8")
    return {name: Program(name=name, **row) for name, row in tomllib.loads(text).items()}


TRAINING_PROGRAMS = _read()
"""Programs whose memory and step time are known, by name."""


def program_named(name: str) -> Program:
    """Return the program of this name; one with defaults if the name is not in the table."""
    return TRAINING_PROGRAMS.get(name) or Program(name=name)

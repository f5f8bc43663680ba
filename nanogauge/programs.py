"""Training programs by name: rows of programs.toml."""

from nanogauge.files import package_table
from nanogauge.spec_parts import Program

TRAINING_PROGRAMS = {name: Program(name=name, **row) for name, row in package_table("programs.toml").items()}
"""Programs whose memory and step time are known, by name."""


def program_named(name: str) -> Program:
    """Return the program of this name; one with defaults if the name is not in the table."""
    return TRAINING_PROGRAMS.get(name) or Program(name=name)

"""The commands in README.md and docs/ are those that there are."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, run_here

from nanogauge.config import Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"(?<![\w/.-])((?:bench/|tests/)?[a-z_]+\.py)(?![\w.])")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*(?:\.[\w-]+)?)")
FILE = re.compile(r"(?<![\w/.~-])(?:configs|predictions|docs|bench|tests)/[\w./-]*\w")
COMMANDS = [path.name for path in ROOT.glob("*.py") if path.name != "model.py"]
FOREIGN = re.compile(r"(docker|pip|xcode-select|python llama\.cpp|--standalone)\b")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|/X\b|\.\.\.")


def commands_of(page: Path) -> Iterator[str]:
    """What stands in code, of a line or indented, continued lines as one."""
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.split("   #")[0]
        else:
            yield from re.findall(r"`([^`]+)`", line)


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags that a command has: those of its help, or of a benchmark's source."""
    if "/" in script:
        return set(re.findall(r'"--([a-z][\w-]*)"', (ROOT / script).read_text()))
    done = run_here(script, "--help")
    assert done.returncode == 0, done.stderr
    return set(FLAG.findall(done.stdout)) | {"help"}


def is_key(flag: str) -> bool:
    """Whether a flag sets a key of a configuration."""
    section, _, key = flag.partition(".")
    known = Config.model_fields.get(section)
    fields = getattr(known.annotation, "model_fields", {}) if known is not None else {}
    return key.replace("-", "_") in fields


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_has_the_options_that_it_is_given(page: Path) -> None:
    """Somebody types them in at night as they stand there."""
    wrong = []
    for command in commands_of(page):
        scripts = [s for s in SCRIPT.findall(command) if "/" in s or s in COMMANDS]
        named = set(FLAG.findall(command))
        if not scripts and FOREIGN.match(command.strip()):
            continue
        known = {flag for script in scripts or COMMANDS for flag in flags_of(script)}
        wrong += [f"{command}: --{flag}" for flag in named - known if not is_key(flag)]
        wrong += [
            f"{command}: there is no {name}"
            for name in FILE.findall(command)
            if not (ROOT / name).exists() and not PLACEHOLDER.search(name)
        ]
    assert wrong == []

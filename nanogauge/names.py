"""The key of our configuration that a misspelt name means, or one of another program."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def exact_meaning(name: str, keys: Collection[str]) -> str | None:
    """Return what to write for a name of another program or section; None if it is unknown.

    Args:
        name: as written, such as train.batch_size, --lr or n-layer.
        keys: existing keys, as section.key.

    Returns:
        "key", "key: remark" or ": remark".
    """
    last = _normal(name).rpartition(".")[2]
    same = (key for key in keys if key.endswith(f".{last}"))
    return next(same, None) or foreign_names().get(last)


def meaning_of(name: str, keys: Collection[str]) -> str | None:
    """Return the same as exact_meaning, also for a misspelt name or section."""
    if (exact := exact_meaning(name, keys)) is not None:
        return exact
    section, _, last = _normal(name).rpartition(".")
    sections = {key.partition(".")[0]: key.partition(".")[0] for key in keys}
    within = {key.partition(".")[2]: key for key in keys if key.startswith(f"{section}.")}
    everywhere = {**foreign_names(), **{key.rpartition(".")[2]: key for key in keys}}
    for names, cutoff in ((within, 0.6), (sections, 0.75), (everywhere, 0.8)):
        if near := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return names[near[0]]
    return None


def _normal(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")


@cache
def foreign_names() -> dict[str, str]:
    """Return name in another program -> its meaning, as meaning_of returns it."""
    logged = _read("importers/formats.toml").values()
    names = {n: key for table in logged for n, key in table.get("names", {}).items() if "." in key}
    return {**names, **_read("names.toml")["keys"]}


def nanogpt_names() -> dict[str, str]:
    """Return key of our configuration -> nanoGPT's name, for keys in its printed configuration."""
    names = _read("importers/formats.toml")["nanogpt"]["names"]
    return {key: name for name, key in names.items()}


def value_meant(value: str, choices: Collection[str]) -> str | None:
    """Return the choice that a value of another spelling means; None if unknown."""
    meant = _read("names.toml")["values"].get(value.lower(), value.lower())
    return next(iter(difflib.get_close_matches(meant, choices, n=1)), None)


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_HERE / name).read_text(encoding="utf-8"))

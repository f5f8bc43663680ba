"""The key of our configuration that a misspelt name means, or one of another program."""

import difflib
import re
from collections.abc import Collection
from functools import cache

from nanogauge.files import package_table


def meaning_of(name: str, keys: Collection[str], is_exact: bool = False) -> str | None:
    """Return what to write instead of a name: "key", "key: remark" or ": remark"; None if unknown.

    Args:
        name: as written, such as train.batch_size, --lr or n-layer.
        keys: existing keys, as section.key.
        is_exact: whether misspelt names count as unknown.
    """
    section, _, last = name.lstrip("-").lower().replace("-", "_").rpartition(".")
    foreign = foreign_names()
    meaning = next((key for key in keys if key.endswith(f".{last}")), None) or foreign.get(last)
    if meaning is not None or is_exact:
        return meaning
    sections = {key.partition(".")[0]: key.partition(".")[0] for key in keys}
    within = {key.partition(".")[2]: key for key in keys if key.startswith(f"{section}.")}
    everywhere = {**foreign, **{key.rpartition(".")[2]: key for key in keys}}
    for names, cutoff in ((within, 0.6), (sections, 0.75), (everywhere, 0.8)):
        if near := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return names[near[0]]
    return None


@cache
def foreign_names() -> dict[str, str]:
    """Return name in another program -> its meaning, as meaning_of returns it."""
    logged = package_table("importers/formats.toml").values()
    names = {n: key for table in logged for n, key in table.get("names", {}).items() if "." in key}
    return {**names, **package_table("names.toml")["keys"]}


def nanogpt_names() -> dict[str, str]:
    """Return key of our configuration -> nanoGPT's name, for keys in its printed configuration."""
    return {key: name for name, key in package_table("importers/formats.toml")["nanogpt"]["names"].items()}


def value_meant(value: str, choices: Collection[str]) -> str | None:
    """Return the choice that a value of another spelling means; None if unknown."""
    meant = package_table("names.toml")["values"].get(value.lower(), value.lower())
    return next(iter(difflib.get_close_matches(meant, choices, n=1)), None)


def toml_remedies(line: str) -> list[str]:
    """Return what to write instead of a line that is no TOML; empty if unknown."""
    table = package_table("names.toml")["toml"]
    return [remedy for pattern, remedy in table.items() if re.search(pattern, line)]

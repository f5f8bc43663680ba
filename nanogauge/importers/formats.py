"""Formats of other programs' logs: the rows of formats.toml."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nanogauge.files import package_table

NUMBER = r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?|inf|nan)"
_WORD_START = r"(?<![\w./-])"
"""Not the end of a longer word, number or path."""


def plain(label: str) -> str:
    """Return a field's label in lower case without blanks, which forks and wrapping change."""
    return re.sub(r"[\s_]", "", label.lower())


@dataclass(frozen=True)
class Format:
    """What the log of one program contains; the head of formats.toml describes the fields."""

    name: str
    title: str
    step_time: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dump: bool = False
    yields: Sequence[str] = ()
    half: str = "float32"
    mfu_peak: float | None = None
    mfu_note: str = ""
    micro_batch_rate: bool = False
    own_model: bool = False
    remarks: Sequence[str] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Source of the run log's lines."""
        return self.name.replace("-", "_") + "_log"


@dataclass(frozen=True)
class TextFormat(Format):
    example: str = ""
    records: Sequence[tuple[str, int]] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    last: str = ""
    begins: str = r"(?!)"
    assignment: str = r"(?!)"
    names: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[Sequence[str]] = ()
    clock: bool = False

    @cached_property
    def starts(self) -> list[tuple[re.Pattern[str], re.Pattern[str], int]]:
        """Patterns of the start of a record, also within a line, and the first step's number."""
        words = ((p if p.startswith("^") else _WORD_START + p, p, n) for p, n in self.records)
        return [(re.compile(start), re.compile(p), n) for start, p, n in words]

    @cached_property
    def field_names(self) -> dict[str, str]:
        """Label without blanks, in lower case -> field of a record."""
        labels = _LABELS | dict(self.labels)
        return {plain(label): name for several, name in labels.items() for label in several.split("|")}

    @cached_property
    def fields(self) -> re.Pattern[str]:
        """Pattern of a field: label, value and unit; or a bare value with its unit."""
        words = [label for several in (_LABELS | dict(self.labels)) for label in several.split("|")]
        words.sort(key=len, reverse=True)
        labels = "|".join(re.escape(word).replace(r"\ ", r"[\s_]*") for word in words)
        return re.compile(
            rf"(?<![A-Za-z_] )(?<![\w.])(?P<label>{labels})(?:\s*[:=]\s*|\s+)(?P<value>{NUMBER})"
            r"\s?(?P<unit>ms|min|[smh%])?(?!\w)"
            rf"|(?<=[|(])\s?(?P<bare>{NUMBER})\s?(?P<kind>ms\b|tok/s|%\s(?:\w+\s)?MFU)",
            re.IGNORECASE,
        )


@dataclass(frozen=True)
class TableFormat(Format):
    step: str = "step"
    marks: Sequence[str] = ()
    steps: Mapping[str, str] = field(default_factory=dict)
    evaluations: Mapping[str, str] = field(default_factory=dict)
    sensors: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    compilations: Mapping[str, str] = field(default_factory=dict)
    peaks: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    energy_from_counter: str = ""
    first_step: int = 0
    first_evaluation: int = 0
    elapsed: str = "_runtime"
    elapsed_unit_seconds: float = 1.0
    total: str = ""
    untimed_first: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return "wandb_history" if self.elapsed == "_runtime" else super().source


_TABLES = dict(package_table("importers/formats.toml"))  # it is shared
_LABELS: dict[str, str] = _TABLES.pop("labels")
PREFIXES: list[str] = _TABLES.pop("before")["lines"]
RESULTS: dict[str, tuple[str, int]] = _TABLES.pop("results")
"""Key of a result -> field of LoggedProcess, and its unit."""
TABLE_FORMATS = {name: TableFormat(name, **row) for name, row in _TABLES.pop("tables").items()}
TEXT_FORMATS = {name: TextFormat(name, **row) for name, row in _TABLES.items()}

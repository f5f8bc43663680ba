"""Reader of printed logs, for every program whose lines are declared as a TextFormat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogauge.importers.parsed import (
    Collector,
    Format,
    LoggedEvaluation,
    LoggedStep,
    ParsedLog,
    parse_number,
)
from nanogauge.importers.text import TextLines, strip_controls, strip_prefixes

WRAPPED_LINES = 8
"""Largest number of lines into which a terminal wraps one."""
_UNITS = {"milliseconds": ("seconds", 1e-3), "mfu_percent": ("mfu", 1e-2)}
"""Named group -> field of a record, and unit; every other group has the name of its field."""
_OF_PROCESS = {"num_iterations", "training_minutes"}
"""Named groups of a step's line that are not fields of the step."""


@dataclass(frozen=True)
class TextFormat(Format):
    """The lines of a program's output, as patterns whose named groups are fields of the records.

    Patterns are searched in lines without timestamps and labels; those of the header must match
    from the start of the line.
    """

    example: str
    """A step's line, for messages."""
    steps: tuple[str, ...]
    evaluations: tuple[str, ...]
    """An evaluation without a step number precedes the step that is printed next."""
    record_start: str
    """Start of a step's or evaluation's line, also of one that is cut."""
    header: tuple[str, ...]
    """Lines before the first step, in the order of printing."""
    assignment: str = ""
    """`name = value` in the dump of the configuration, which begins with the first header line."""
    checkpoint: str = ""
    peak_mib: str = ""
    """Peak allocated memory in MiB."""
    other_stage: str = ""
    """Line of a training stage that is not imported; the next step ends that stage."""
    wraps: bool = False
    """True if a step's line is long enough to be wrapped by a terminal."""

    def read(self, path: Path) -> ParsedLog:
        """Parse a log; lines of other programs are skipped.

        Raises:
            BadInput: if the file cannot be read or has no step, or a line before the last is
                cut or damaged.
        """
        lines = TextLines(path, self.what)
        printable = ((number, strip_controls(line)) for number, line in lines)
        parser = _Parser(self, Collector(path))
        for number, line in self._unwrapped(printable) if self.wraps else printable:
            text = strip_prefixes(line)
            try:
                parser.parse(number, text)
            except ValueError:
                parser.log.mark_damaged(number, text)
        return parser.log.finish(self, lines.too_long, self.example)

    def _unwrapped(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Rejoin step lines that a terminal has wrapped over several lines."""
        number, joined, count = 0, "", 0
        for n, line in lines:
            if start := re.search(self.record_start, line):
                if joined:
                    yield number, joined
                number, joined, count = n, line[start.start() :], 1
            elif joined:
                joined, count = joined + line[:300], count + 1
            else:
                yield n, line
            if joined and (count == WRAPPED_LINES or _search(self.steps, joined)):
                yield number, joined
                joined = ""
        if joined:
            yield number, joined


class _Parser:
    """Turn the lines of one log into records."""

    def __init__(self, format: TextFormat, log: Collector) -> None:
        self.log = log
        self._format = format
        self._pending: dict[str, float] = {}
        """Values of an evaluation whose step number follows in the next step's line."""
        self._previous: tuple[int, str, bool] | None = None
        """Last step's line, and whether it contains an MFU."""
        self._header_position = -1
        self._decayed_parameters = math.nan
        self._other_stage = False

    def parse(self, number: int, line: str) -> None:
        """Parse one line.

        Raises:
            ValueError: if the line is cut or damaged.
            BadInput: if a line before it is.
        """
        form = self._format
        if match := _search(form.steps, line):
            self._take_step(number, line, match)
        elif match := _search(form.evaluations, line):
            self._take_evaluation(number, match)
        elif form.checkpoint and re.search(form.checkpoint, line):
            self.log.add_checkpoint()
        elif re.match(form.record_start, line):
            raise ValueError
        elif form.other_stage and re.search(form.other_stage, line):
            self._other_stage = True
        elif form.peak_mib and (match := re.search(form.peak_mib, line)):
            if self.log.current is not None and not self._other_stage:
                self.log.current.peak_allocated_bytes = round(parse_number(match[1]) * 2**20)
        else:
            self._take_header(number, line)

    def _take_step(self, number: int, line: str, match: re.Match[str]) -> None:
        has_mfu = match.groupdict().get("mfu_percent", "") is not None
        if self._previous is not None:
            previous_number, previous_line, previous_has_mfu = self._previous
            if previous_has_mfu and not has_mfu:
                raise ValueError  # cut after its time
            if has_mfu and not previous_has_mfu:
                self.log.mark_damaged(previous_number, previous_line)
        self._previous = number, line, has_mfu
        figures = _figures(match)
        step = int(figures.pop("step"))
        if self._pending:
            self._add_evaluation(number, step, {"val_loss": None, **self._pending})
            self._pending = {}
        self.log.add_step(number, LoggedStep(step, **figures))
        self._other_stage = False
        printed, process = match.groupdict(), self.log.current
        assert process is not None
        if "num_iterations" in printed:
            process.settings["num_iterations"] = (number, printed["num_iterations"])
        if "training_minutes" in printed:
            process.training_seconds = 60 * parse_number(printed["training_minutes"])

    def _take_evaluation(self, number: int, match: re.Match[str]) -> None:
        figures = _figures(match)
        if "step" in figures:
            self._add_evaluation(number, int(figures.pop("step")), {**figures})
        else:
            self._pending |= figures

    def _add_evaluation(self, number: int, step: int, figures: dict[str, float | None]) -> None:
        accuracy = figures.pop("accuracy", None)
        if figures:
            self.log.add_evaluation(number, LoggedEvaluation(step, **figures))
        if accuracy is not None and self.log.current is not None:
            self.log.current.accuracy = (step, accuracy)

    def _take_header(self, number: int, line: str) -> None:
        """Parse a header line, which every rank prints.

        A line that precedes an already printed one in header order is from another process: the
        previous process has ended, or another rank prints the same lines.
        """
        for position, pattern in enumerate(self._format.header):
            if match := re.match(pattern, line):
                self._enter_header(number, position, match)
                break
        assignment = self._format.assignment
        if self._header_position == 0 and assignment and (match := re.match(assignment, line)):
            self.log.add_setting(number, match[1], match[2].strip())

    def _enter_header(self, number: int, position: int, match: re.Match[str]) -> None:
        printed = {name: value for name, value in match.groupdict().items() if value}
        resumed = printed.pop("resumed", "") != ""
        self.log.begin_process(number, resumed, restarted=position < self._header_position)
        self._header_position = position
        if decayed := printed.pop("decayed_parameters", ""):
            self._decayed_parameters = parse_number(decayed)
        if other := printed.pop("other_parameters", ""):
            total = self._decayed_parameters + parse_number(other)
            if not math.isnan(total):
                printed["total_parameters"] = f"{total:.0f}"
        for name, value in printed.items():
            self.log.add_setting(number, name, value)


def _search(patterns: tuple[str, ...], text: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := re.search(pattern, text))), None)


def _figures(match: re.Match[str]) -> dict[str, float]:
    """Return the figures of a line by field.

    Raises:
        ValueError: if a time is not above 0, or a figure overflows.
    """
    figures = {}
    for group, text in match.groupdict().items():
        if text is not None and group not in _OF_PROCESS:
            name, unit = _UNITS.get(group, (group, 1.0))
            figures[name] = parse_number(text) * unit
    if not 0 < figures.get("seconds", 1.0) < math.inf:
        raise ValueError
    if figures.get("mfu", 0.0) < 0:  # nanoGPT's -100 %, before it has an estimate
        del figures["mfu"]
    return figures

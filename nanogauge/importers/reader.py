"""Reader of printed logs, for every program of formats.toml."""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanogauge.errors import BadInput
from nanogauge.importers.formats import RESULTS, TEXT_FORMATS, TextFormat, plain
from nanogauge.importers.parsed import Collector, LoggedEvaluation, LoggedStep, ParsedLog, parse_number
from nanogauge.importers.tables import read_table
from nanogauge.importers.text import TextLines, strip_controls, strip_prefixes

WRAPPED_LINES = 8
"""Largest number of lines into which a terminal wraps one."""
_LONGEST, _SHORT = 4000, 40
"""Characters of a line that are searched, and of a record without fields that is cut."""
_NO_RECORD = "-"
"""A line that no wrapped line continues in."""
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BARE = {"ms": "seconds", "tok/s": "tokens_per_second"}
_IS_EVALUATION = {"val_loss", "bits_per_byte", "accuracy"}
_LOSSES = {"train_loss", "val_loss", "bits_per_byte"}
_WHAT = "the log of a training run"


def parse_log(path: Path) -> ParsedLog:
    """Read a log of any known program, which its content names.

    Raises:
        BadInput: if the file cannot be read or is of no known program.
    """
    if (table := read_table(path)) is not None:
        return table
    format = recognize(strip_controls(line) for _, line in TextLines(path, _WHAT))
    if format is None:
        examples = "; ".join(f"'{f.example}' ({f.title})" for f in TEXT_FORMATS.values())
        raise BadInput(f"{path} is no log of a known program: it has no line like {examples}.")
    lines = TextLines(path, _WHAT)
    parser = LogParser(format)
    for number, line in lines:
        parser.read(number, line)
    return parser.finish(lines.too_long)


def recognize(lines: Iterable[str]) -> TextFormat | None:
    """Return the format of the first step among the lines, else of the first evaluation."""
    fallback = None
    for line in lines:
        for text in dict.fromkeys((line, strip_prefixes(line))):
            for format in TEXT_FORMATS.values():
                for start, _, _ in format.starts:
                    match = start.search(text)
                    if match is None:
                        continue
                    fields = {m["label"] for m in format.fields.finditer(text, match.end())}
                    names = {format.field_names[plain(label)] for label in fields if label}
                    if names and not names & _IS_EVALUATION:
                        return format
                    fallback = fallback or (format if names else None)
    return fallback


class LogParser:
    """Turn the lines of one log into records, in the order in which they come.

    `now` returns the elapsed seconds of the line that is read; None in a log without times.
    """

    def __init__(self, format: TextFormat, now: Callable[[], float | None] = lambda: None) -> None:
        self.log = Collector()
        self._now = now
        self.format = format
        self._begins, self._assignment, self._last_part = (
            re.compile(p) for p in (format.begins, format.assignment, format.last)
        )
        self._facts = [(re.compile(p), keys) for p, *keys in format.facts]
        self._labels: dict[str, str] = {}
        # Number of a wrapped line's first piece, the pieces so far, their number, and the time of the first.
        self._joined: tuple[int, str, int, float | None] | None = None
        self._elapsed: float | None = None  # of the record that is taken
        self._wraps = True
        self._pending: dict[str, Any] = {}  # of an evaluation before the next step
        self._forms: dict[type[LoggedStep | LoggedEvaluation], list[str]] = {}
        """Fields of the last record of each kind, in order."""
        self._shapes: dict[str, tuple[float, str]] = {}  # fewest decimals so far, and unit
        self._latest: tuple[int, LoggedStep | LoggedEvaluation, bool] | None = None
        """Number and record of the last line, and whether it may be cut."""
        self._clock = (-1, 0.0)  # step and training time of the last step
        self._position = -1  # 0 within the printed configuration, 1 after it
        self._label = ""  # pattern of what stands before each line of the configuration
        self._decayed_parameters = math.nan
        self._other_stage = False

    def read(self, number: int, line: str) -> None:
        """Read one line; lines of other programs are skipped, damaged ones counted."""
        try:
            self._read(number, strip_controls(line))
        except (ValueError, OverflowError):  # a figure of thousands of digits, or too large
            self.log.left_out.append(number)

    def _read(self, number: int, line: str) -> None:
        if not line:
            return
        found = self._start(line)
        now = self._elapsed = self._now()
        if self._joined is not None:
            first, text, count, self._elapsed = self._joined
            self._joined = None
            if not found and line != _NO_RECORD and not self._is_other(line[:_LONGEST]):
                text, count = text + line[:300], count + 1
                if count == WRAPPED_LINES or self._last_part.search(text):
                    self._take_records(first, text)
                else:
                    self._joined = first, text, count, self._elapsed
                return
            self._take_records(first, text)
            self._elapsed = now
            self._wraps &= count > 1  # else whole lines of another form
        if found and found[1] and self._wraps and not self._last_part.search(found[0]):
            self._joined = number, found[0], 1, now
        elif found is not None:
            self._take_records(number, *found)
        elif len(line) <= _LONGEST:
            self._take_other(number, line)

    def finish(self, too_long: list[int]) -> ParsedLog:
        """Return what was read; the last line is left out if it is cut."""
        if self._joined is not None:
            self.read(self._joined[0], _NO_RECORD)
        self._drop_if_cut()
        process = self.log.processes[-1] if self.log.processes else None
        if process is not None and (process.steps or process.evaluations):
            self._add_evaluation(0, process.updates, self._pending)
        return self.log.finish(self.format, too_long)

    def _start(self, line: str) -> tuple[str, bool] | None:
        """Return a line from the start of a record on, and if nothing but labels is before it."""
        text = line
        for _ in range(2):  # the labels are stripped only where they hide a record
            for start, _, _ in self.format.starts:
                if match := start.search(text):
                    return text[match.start() :][:_LONGEST], match.start() == 0
            text = strip_prefixes(line)
        return None

    def _is_other(self, line: str) -> bool:
        texts = (line, strip_prefixes(line))
        return any(p.search(t) for p, _ in [(self._begins, []), *self._facts] for t in texts)

    def _take_records(self, number: int, text: str, at_begin: bool = True) -> None:
        """Take a line's record, or several where another process wrote into the line."""
        for start, within, first in self.format.starts:
            if match := start.match(text):
                for begin in within.finditer(text, match.end()):
                    piece = text[match.end() : begin.start()]
                    self._take_record(number, piece, match, first, at_begin)
                    match = begin
                self._take_record(number, text[match.end() :], match, first, at_begin)
                return

    def _take_record(self, number: int, text: str, start: re.Match[str], first: int, at_begin: bool) -> None:
        fields, shapes = self._fields(text)
        names, step = list(fields), int(start["step"])
        if not names and not (at_begin and len(text) < _SHORT):
            return
        if not names or not 0 < fields.get("seconds", 1.0) < math.inf:
            self.log.left_out.append(number)
            return
        shape = shapes.get(names[-1], (math.inf, ""))
        usual = self._shapes.get(names[-1], shape)
        short = shape[0] < usual[0] or (shape[0] < math.inf and shape[1] != usual[1])
        if self._latest is not None and step - first < self._latest[1].step - 1:
            self._drop_if_cut()
        record: LoggedStep | LoggedEvaluation
        if _IS_EVALUATION & fields.keys():
            if "loss" in fields:
                fields["train_loss"] = fields.pop("loss")
            record = self._add_evaluation(number, step, fields)
        else:
            record = self._add_step(number, max(step - first, 0), fields)
        form = self._forms.get(type(record), names)
        less = len(names) < len(form) and form[: len(names)] == names
        if less and short:
            self.log.remove(number, record)
            return
        self._latest = number, record, less or short
        self._forms[type(record)] = names
        if shapes != self._shapes:
            for name, shape in shapes.items():
                self._shapes[name] = min(shape, self._shapes.get(name, shape))
        if "steps" in start.re.groupindex and self.log.current is not None:
            self.log.current.settings["train.max_steps"] = number, "num_iterations", start["steps"]

    def _drop_if_cut(self) -> None:
        if self._latest is not None and self._latest[2]:
            self.log.remove(*self._latest[:2])
        self._latest = None

    def _add_step(self, number: int, step: int, fields: dict[str, float]) -> LoggedStep:
        if self._pending:
            self._add_evaluation(number, step, self._pending)
            self._pending = {}
        training_seconds = fields.pop("training_seconds", None)
        if self.format.clock and training_seconds is not None:
            at, before = self._clock if self._clock[0] < step else (-1, 0.0)
            seconds = (training_seconds - before) / (step - at)
            if seconds > 0 and (step == 0 or at >= 0):
                fields["seconds"] = seconds
            self._clock = step, training_seconds
        record = LoggedStep(step, **fields, elapsed_seconds=self._elapsed)
        self.log.add(number, record)
        self._other_stage = False
        if training_seconds is not None and self.log.current is not None:
            self.log.current.training_seconds = training_seconds
        return record

    def _add_evaluation(self, number: int, step: int, fields: dict[str, Any]) -> LoggedEvaluation:
        losses = {k: v for k, v in fields.items() if k in _LOSSES}
        record = LoggedEvaluation(step, **losses, elapsed_seconds=fields.get("elapsed_seconds", self._elapsed))
        if losses:
            self.log.add(number, record)
        if "accuracy" in fields and self.log.current is not None:
            self.log.current.accuracy = (step, fields["accuracy"])
        return record

    def _fields(self, text: str) -> tuple[dict[str, float], dict[str, tuple[float, str]]]:
        """Return the fields of a record in order, and the decimals and units of the finite ones."""
        fields: dict[str, float] = {}
        shapes: dict[str, tuple[float, str]] = {}
        for label, labelled, after, bare, kind in self.format.fields.findall(text):
            unit, value = after or kind, labelled or bare
            name = self._labels.get(label) if label else _BARE.get(kind, "mfu")
            if name is None:
                name = self._labels[label] = self.format.field_names[plain(label)]
            if name in fields:
                continue
            number = parse_number(value)
            if math.isfinite(number):
                shapes[name] = len(value.partition(".")[2]), unit
            if name in ("seconds", "training_seconds"):
                number *= _UNIT_SECONDS.get(unit, 1.0)
            elif name == "mfu":  # nanoGPT prints -100 % before it has an estimate
                number = number / 100 if number >= 0 else math.nan
            fields[name] = number
        return fields, shapes

    def _take_other(self, number: int, line: str) -> None:
        """Read a line of the start, the end or the configuration, or a part of an evaluation."""
        if begin := self._begins.search(line):
            self._drop_if_cut()
            self.log.begin_process(number, restarted=self._position > 0)
            self._position = 0
            # What stands before it, such as a clock, stands before each line.
            self._label = re.sub(r"\d+", r"\\d+", re.escape(line[: begin.start()]))
        stripped = strip_prefixes(line)
        for pattern, keys in self._facts:
            if match := pattern.search(line) or pattern.search(stripped):
                for key, text in zip(keys, match.groups(), strict=True):
                    self._take_fact(number, key, text)
        if self._position == 0:
            rest = re.sub(f"^{self._label}", "", line) if self._label else line
            match = self._assignment.match(rest) or self._assignment.match(stripped)
            if match and match[1] in self.format.names:
                name = match[1]
                self.log.add_setting(number, self.format.names[name], name, match[2].strip(), True)

    def _take_fact(self, number: int, key: str, text: str) -> None:
        process = self.log.current
        if key == "checkpoint":
            if process is not None and process.evaluations:
                process.checkpoints.add(process.evaluations[-1].step)
        elif key == "other_stage":
            self._other_stage = True
        elif key in _IS_EVALUATION:
            self._pending |= {key: parse_number(text), "elapsed_seconds": self._elapsed}
        elif key in RESULTS:
            if process is not None and not self._other_stage:
                name, unit = RESULTS[key]
                value = parse_number(text) * unit
                setattr(process, name, value if name.endswith("seconds") else round(value))
        else:
            self.log.begin_process(number, resumed=key == "resumed")
            self._position = 1
            name = key.rpartition(".")[2]
            if key == "decayed_parameters":
                self._decayed_parameters = parse_number(text)
            elif key == "other_parameters":
                total = self._decayed_parameters + parse_number(text)
                key, text = "total_parameters", "" if math.isnan(total) else f"{total:.0f}"
            self.log.add_setting(number, key, name, text)

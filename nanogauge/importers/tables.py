"""Reader of histories: CSV, JSON lines and trainer_state.json, one row for each call of log().

A column means what the program that logged it means. The columns of the formats in formats.toml are read; all others
are listed and ignored.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from nanogauge.errors import BadInput
from nanogauge.importers.formats import TABLE_FORMATS, TableFormat
from nanogauge.importers.parsed import (
    Collector,
    LoggedEvaluation,
    LoggedProcess,
    LoggedStep,
    ParsedLog,
    not_in_log,
    parse_number,
)
from nanogauge.importers.text import TextLines, quoted
from nanogauge.schema import Checkpoint, Compile, Event, Sensor
from nanogauge.sinks.rows import CHECKPOINT_KEYS, COMPILE_KEYS, EVAL_KEYS, SENSOR_KEYS

_WHAT = "the history of a run"
_W_AND_B_CLOCK = ("_runtime", "_timestamp")
"""Seconds since the start of W&B's run, and Unix time."""
_MAY_BE_INFINITE = {"loss", "grad_norm", "train_loss", "val_loss", "bits_per_byte"}

_Row = dict[str, float]


def _column_to_field(keys: Mapping[str, str]) -> dict[str, str]:
    return {column: name for name, column in keys.items()}


_FORMATS = (
    replace(
        TABLE_FORMATS.pop("nanogauge"),
        evaluations=_column_to_field(EVAL_KEYS) | {"eval/val_bits_per_byte": "bits_per_byte"},
        sensors=_column_to_field(SENSOR_KEYS),
        checkpoints=_column_to_field(CHECKPOINT_KEYS),
        compilations=_column_to_field(COMPILE_KEYS),
    ),
    *TABLE_FORMATS.values(),
)


class _Table:
    """The rows of a file, and what stands beside them."""

    def __init__(self, path: Path) -> None:
        lines = TextLines(path, _WHAT)
        self.too_long = lines.too_long
        """Numbers of the lines that were skipped for their length."""
        self.beside: dict[str, Any] = {}
        self.columns: list[str] = []
        self.rows: list[tuple[int, Mapping[str, Any] | None]] = []
        """Number of each row's line, and its cells; None for a damaged row."""
        numbered = iter(lines)
        first = next((x for x in numbered if x[1].strip()), (1, ""))
        if first[1].lstrip().startswith("{"):
            self._read_json([first, *numbered])
        elif "," in first[1]:
            self._read_csv(path, chain([first], numbered))

    def _read_json(self, numbered: list[tuple[int, str]]) -> None:
        """Read JSON lines, or one object with its rows in log_history, as of transformers."""
        rows = [(n, _object(line)) for n, line in numbered if line.strip()]
        if rows[0][1] is None or "log_history" in rows[0][1]:
            self.beside = _object("\n".join(line for _, line in numbered)) or {}
            history = self.beside.pop("log_history", None)
            places = [n for n, line in numbered if line.strip() == "{"][1:]
            found = history if isinstance(history, list) else []
            whole = [row if isinstance(row, dict) else None for row in found]
            rows = list(zip([*places, *[1] * len(whole)], whole, strict=False))
        self.columns = list(dict.fromkeys(key for _, row in rows for key in row or {}))
        self.rows = list(rows)

    def _read_csv(self, path: Path, numbered: Iterator[tuple[int, str]]) -> None:
        reader = csv.reader(f"{line}\n" for _, line in numbered)
        try:
            self.columns = columns = _without_run_name(path, next(reader, []))
            for cells in filter(None, reader):
                whole = len(cells) == len(columns)
                row = dict(zip(columns, cells, strict=True)) if whole else None
                self.rows.append((reader.line_num + len(self.too_long), row))
        except csv.Error:
            text = f"line {reader.line_num} of {path} is no line of a CSV file"
            raise BadInput(f"{text}; export it again.") from None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _without_run_name(path: Path, columns: list[str]) -> list[str]:
    """Remove the run's name, which the columns of an exported chart begin with."""
    names = {c.rsplit(" - ", 1)[0] for c in columns if " - " in c}
    if len(names) > 1:
        raise BadInput(f"{path} holds the columns of {len(names)} runs; export one run alone.")
    short = [c.rsplit(" - ", 1)[-1] for c in columns]
    return ["_step" if c == "Step" and names else c for c in short]


def _figures(row: Mapping[str, Any], names: set[str]) -> _Row:
    """Return the numbers of a row's named columns; ValueError if a cell is none."""
    figures: _Row = {}
    for name in names & row.keys():
        cell = row[name]
        if cell not in (None, ""):
            if isinstance(cell, list | dict):
                raise ValueError
            figures[name] = parse_number(cell) if isinstance(cell, str) else float(cell)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def read_table(path: Path) -> ParsedLog | None:
    """Read a history; None if the file is no table of a known program.

    Raises:
        BadInput: if the file cannot be read, or is a CSV file of no known program.
    """
    table = _Table(path)
    format = next((f for f in _FORMATS if {f.step, *f.marks} <= set(table.columns)), None)
    if format is None:
        if path.suffix != ".csv":
            return None
        known = "; ".join(f"{', '.join((f.step, *f.marks))} ({f.title})" for f in _FORMATS)
        raise BadInput(
            f"{path} has not the columns of a program whose history is known: {known}; "
            "export the whole history of one run."
        )
    repeated = [name for name, n in Counter(table.columns).items() if name and n > 1]
    if repeated:
        raise BadInput(f"{path} has two columns {quoted(min(repeated))}; export one run alone.")
    parser, known_columns = _Parser(format), _known_columns(format)
    for number, row in table.rows:
        try:
            if row is None:
                raise ValueError
            parser.parse(number, _figures(row, known_columns))
        except (ValueError, OverflowError, TypeError):
            parser.log.left_out.append(number)
    parsed = parser.log.finish(format, table.too_long)
    processes = parsed.processes
    for process in processes:
        if len(processes) > 1 and format.elapsed == "_runtime":  # includes the time between them
            process.steps = [replace(s, elapsed_seconds=None) for s in process.steps]
            process.evaluations = [replace(e, elapsed_seconds=None) for e in process.evaluations]
        for name, key in format.names.items():
            if isinstance(value := table.beside.get(name), int | float | str) and value:
                process.settings[key] = (1, name, str(value))
    if not any(step.seconds is not None for process in processes for step in process.steps):
        parsed.events += _times_between_rows(processes)
    return parsed


def _known_columns(f: TableFormat) -> set[str]:
    mappings = (f.steps, f.evaluations, f.sensors, f.checkpoints, f.compilations, f.peaks)
    single = {f.step, f.elapsed, f.energy_from_counter, f.total, *_W_AND_B_CLOCK}
    return single.union(*mappings) - {""}


class _Parser:
    def __init__(self, columns: TableFormat) -> None:
        self.log = Collector()
        self._columns = columns
        # Only our mirror logs compilations, and every row's step, so that it can be seen where a process resumed the
        # run; its `hours` are those of all processes.
        self._is_mirror = bool(columns.compilations)
        self._latest_elapsed = self._earlier_processes = 0.0
        self._latest_step = 0

    def parse(self, number: int, row: _Row) -> None:
        """Parse one row; ValueError if a figure does not fit its column."""
        columns = self._columns
        count = row.get(columns.step)
        if count is not None:
            step = int(count) - columns.first_step
            if step < -columns.first_step or not count.is_integer():
                raise ValueError
            if self._is_mirror and self._resumes(row, step):
                self.log.begin_process(number, resumed=True)
            self._take(number, row, step, self._elapsed_seconds(row))

    def _take(self, number: int, row: _Row, step: int, elapsed: float | None) -> None:
        columns, log = self._columns, self.log
        if figures := _fields(row, columns.evaluations):
            updates = max(step + columns.first_step - columns.first_evaluation, 0)
            log.add(number, LoggedEvaluation(updates, elapsed_seconds=elapsed, **figures))
        if (figures := _fields(row, columns.steps)) and step >= 0:
            if columns.untimed_first and step == 0:
                figures = {name: x for name, x in figures.items() if name in _MAY_BE_INFINITE}
            log.add(number, LoggedStep(step, elapsed_seconds=elapsed, **figures))
        if columns.total and columns.total in row and log.current is not None:
            log.current.total_seconds = row[columns.total]
        if figures := _fields(row, columns.compilations):
            at = None if log.current is None else step + 1  # its row has the step before
            log.add_line(Compile(elapsed_seconds=elapsed, step=at, mode="compiled", **figures))
        if figures := _fields(row, columns.sensors):
            sources = {0.0: "integral", 1.0: "counter"}
            source = sources.get(row.get(columns.energy_from_counter, math.nan))
            reading = {"elapsed_seconds": elapsed, "energy_source": source, **figures}
            log.add_line(Sensor.model_validate(reading))
        if figures := _fields(row, columns.checkpoints):
            checkpoint = {"elapsed_seconds": elapsed, "step": step, **figures}
            log.add_line(Checkpoint.model_validate(checkpoint))
        if log.current is not None:
            for name, (peak, unit_bytes) in columns.peaks.items():
                if name in row:
                    earlier = getattr(log.current, peak) or 0
                    setattr(log.current, peak, max(round(row[name] * unit_bytes), earlier))

    def _resumes(self, row: _Row, step: int) -> bool:
        """Return True for the first row of a later process, where step numbers fall back."""
        if row.keys() & self._columns.checkpoints.keys():
            return False  # written late
        falls_back = step < self._latest_step
        if falls_back:
            self._earlier_processes = self._latest_elapsed
        if falls_back or not row.keys() & self._columns.evaluations.keys():
            self._latest_step = step  # an evaluation's row is one step ahead
        return falls_back

    def _elapsed_seconds(self, row: _Row) -> float | None:
        """Return the time of a row since its process started; None if the row has none."""
        elapsed = row.get(self._columns.elapsed)
        if elapsed is None:
            return None
        elapsed *= self._columns.elapsed_unit_seconds
        if not 0 <= elapsed < math.inf:
            raise ValueError
        self._latest_elapsed = max(self._latest_elapsed, elapsed)
        return elapsed - self._earlier_processes


def _fields(row: _Row, mapping: Mapping[str, str]) -> dict[str, float]:
    """Return the figures of the mapped columns by field; ValueError for an impossible one."""
    figures = {name: row[column] for column, name in mapping.items() if column in row}
    for name, value in figures.items():
        wrong = name in ("seconds", "tokens_per_second") and value <= 0
        if wrong or not (math.isfinite(value) or name in _MAY_BE_INFINITE):
            raise ValueError
    return figures


def _times_between_rows(processes: list[LoggedProcess]) -> Iterator[Event]:
    """Yield an event per report row without a value, with the step time incl. evaluation."""
    times = [p.total_seconds / p.updates for p in processes if p.total_seconds and p.updates]
    for process in processes:
        clocks = [(e.step, e.elapsed_seconds) for e in process.evaluations if e.elapsed_seconds]
        if len(clocks) > 1:
            steps, seconds = (b - a for a, b in zip(clocks[0], clocks[-1], strict=True))
            times.append(seconds / steps)
    reason = "no row has the time of a step"
    if times:
        reason += f"; a step took {max(times):.4g} s, with its share of the evaluation"
    for row in ("step_seconds", "mfu_palm", "mfu_6n"):
        yield not_in_log(row, reason)

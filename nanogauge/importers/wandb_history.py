"""Reader of a run's history exported from W&B as CSV: one row for each call of log().

A column means what the program that logged it means. The columns of the programs in PROGRAMS are
read; all others are listed and ignored.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.importers.parsed import (
    Collector,
    Format,
    LoggedEvaluation,
    LoggedProcess,
    LoggedStep,
    ParsedLog,
    has_clock,
    not_in_log,
    parse_number,
    warning,
)
from nanogauge.importers.text import TextLines, quoted
from nanogauge.schema import Checkpoint, Compile, Event, Sensor
from nanogauge.sinks.rows import CHECKPOINT_KEYS, COMPILE_KEYS, EVAL_KEYS, SENSOR_KEYS

_WHAT = "the history of a W&B run"
_LATEST_UNIX = 2**33  # the year 2242
_SAMPLED_ROWS = 500
"""Default limit of Run.history() in W&B's API."""
_LISTED_COLUMNS = 40
_W_AND_B_CLOCK = ("_runtime", "_timestamp")
"""Seconds since the start of W&B's run, and Unix time."""
_MAY_BE_INFINITE = {"loss", "grad_norm", "train_loss", "val_loss", "bits_per_byte"}

_Row = dict[str, float]


class _Table:
    """The rows of a CSV file.

    Raises:
        BadInput: if it cannot be read, is damaged, or has a column twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = TextLines(path, _WHAT)
        self.too_long = lines.too_long
        """Numbers of the lines that were skipped for their length."""
        self._reader = csv.reader(f"{line}\n" for _, line in lines)
        self.columns = _without_run_name(path, next(self._lines(), []))
        repeated = [name for name, n in Counter(self.columns).items() if name and n > 1]
        if repeated:
            raise BadInput(f"{path} has two columns {quoted(min(repeated))}; export one run alone.")

    def rows(self, names: Collection[str]) -> Iterator[tuple[int, _Row | None]]:
        """Yield each row's number and its figures in the named columns; None for a damaged row."""
        for cells in self._lines():
            if cells:
                row = None
                if len(cells) == len(self.columns):
                    named = zip(self.columns, cells, strict=True)
                    row = _figures({name: cell for name, cell in named if cell and name in names})
                yield self._reader.line_num + len(self.too_long), row

    def _lines(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error:
            raise BadInput(
                f"line {self._reader.line_num} of {self._path} is no line of a CSV file; "
                "export it again."
            ) from None


def _without_run_name(path: Path, columns: list[str]) -> list[str]:
    """Remove the run's name, which the columns of an exported chart begin with."""
    names = {c.rsplit(" - ", 1)[0] for c in columns if " - " in c}
    if len(names) > 1:
        raise BadInput(f"{path} holds the columns of {len(names)} runs; export one run alone.")
    short = [c.rsplit(" - ", 1)[-1] for c in columns]
    return ["_step" if c == "Step" and names else c for c in short]


def _figures(cells: dict[str, str]) -> _Row | None:
    """Return the numbers of a row without NaN; None if a cell is no number."""
    try:
        row = {name: parse_number(cell) for name, cell in cells.items()}
    except ValueError:
        return None
    return {name: value for name, value in row.items() if not math.isnan(value)}


@dataclass(frozen=True)
class LoggedColumns:
    """The columns that a program logs to W&B; each mapping is from column to field of ours."""

    program: str
    step: str
    """Column of the step number."""
    marks: tuple[str, ...]
    """Columns that together identify the program."""
    steps: dict[str, str] = field(default_factory=dict)
    """Fields of LoggedStep; empty for a program that logs only at its evaluations."""
    evaluations: dict[str, str] = field(default_factory=dict)
    sensors: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    compilations: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Column -> field of LoggedProcess, and bytes per unit of the column."""
    energy_from_counter: str = ""
    """Column that is 1 if the energy is the driver's counter, 0 if it is integrated power."""
    first_step: int = 0
    """Number of the first step by the program's count."""
    elapsed: str = "_runtime"
    """Column of the time since the start."""
    elapsed_unit_seconds: float = 1.0
    compilation_inside: bool = False
    remarks: tuple[str, ...] = ()
    """Warnings for the report."""

    @property
    def all_columns(self) -> set[str]:
        mappings = (self.steps, self.evaluations, self.sensors, self.checkpoints, self.compilations)
        single = {self.step, self.elapsed, self.energy_from_counter, *_W_AND_B_CLOCK, *self.peaks}
        return single.union(*mappings) - {""}

    def format(self) -> Format:
        return Format(
            source="wandb_history",
            program=f"W&B history of {self.program}",
            what=_WHAT,
            evaluation_inside=False,
            compilation_inside=self.compilation_inside,
            note="The history does not name its device or software: the device is as given on the "
            "command line.",
            events=self._events,
        )

    def _events(self, run: list[LoggedProcess]) -> list[Event]:
        events = [warning("columns", text) for text in self.remarks]
        if self.elapsed == "_runtime" and has_clock(run):
            text = "The total time is W&B's: from the start of its run to its last row."
            events.append(warning("clock", text))
        return events


_OTHER_MODEL = (
    "{}'s model is not the GPT of the configuration: parameters, FLOPs, MFU and every prediction "
    "are of the configuration that was given, and right as far as it is."
)


def _column_to_field(keys: dict[str, str]) -> dict[str, str]:
    return {column: name for name, column in keys.items()}


PROGRAMS = (
    LoggedColumns(
        program="nanogauge",
        step="step",
        marks=("perf/step_seconds",),
        steps={
            "train/loss": "loss",
            "train/learning_rate": "learning_rate",
            "train/grad_norm": "grad_norm",
            "perf/step_seconds": "seconds",
            "perf/tokens_per_second": "tokens_per_second",
        },
        evaluations=_column_to_field(EVAL_KEYS) | {"eval/val_bits_per_byte": "bits_per_byte"},
        sensors=_column_to_field(SENSOR_KEYS),
        checkpoints=_column_to_field(CHECKPOINT_KEYS),
        compilations=_column_to_field(COMPILE_KEYS),
        peaks={
            "memory/peak_allocated_bytes": ("peak_allocated_bytes", 1),
            "memory/peak_reserved_bytes": ("peak_reserved_bytes", 1),
        },
        energy_from_counter="gpu/energy_from_counter",
        elapsed="hours",
        elapsed_unit_seconds=3600.0,
    ),
    LoggedColumns(
        program="torchtitan",
        step="_step",
        marks=("loss_metrics/global_avg_loss",),
        steps={
            "loss_metrics/global_avg_loss": "loss",
            "grad_norm": "grad_norm",
            "time_metrics/end_to_end(s)": "seconds",
            "throughput(tps)": "tokens_per_second",
        },
        first_step=1,
        peaks={"memory/max_reserved(GiB)": ("peak_reserved_bytes", 2**30)},
        remarks=(
            _OTHER_MODEL.format("torchtitan"),
            "A step's time is torchtitan's mean since its last row, with evaluations and "
            "checkpoints between. The first row's time is left out, because torchtitan divides it "
            "by steps that were not made.",
        ),
    ),
    LoggedColumns(
        program="nanochat",
        step="step",
        marks=("train/dt", "total_training_time"),
        steps={
            "train/loss": "loss",
            "train/dt": "seconds",
            "train/tok_per_sec": "tokens_per_second",
            "train/grad_norm": "grad_norm",
        },
        evaluations={"val/bpb": "bits_per_byte"},
        compilation_inside=True,
        remarks=(_OTHER_MODEL.format("nanochat"), "The losses are nanochat's running means."),
    ),
    LoggedColumns(
        program="nanoGPT",
        step="iter",
        marks=("train/loss", "val/loss"),
        evaluations={"train/loss": "train_loss", "val/loss": "val_loss"},
    ),
)


def read_wandb_history(path: Path) -> ParsedLog:
    """Read a history that was exported as CSV.

    Raises:
        BadInput: if the file cannot be read, is of no known program, or a row is damaged.
    """
    table = _Table(path)
    columns = _columns_of(path, table.columns)
    parser, known = _Parser(columns, Collector(path)), columns.all_columns
    rows = 0
    for number, row in table.rows(known):
        rows += 1
        try:
            if row is None:
                raise ValueError
            parser.parse(number, row)
        except (ValueError, OverflowError):
            parser.log.mark_damaged(number, "its cells do not fit their columns")
    parsed = parser.log.finish(
        columns.format(), table.too_long, "a row of a step", steps_needed=False
    )
    processes = parsed.processes
    if len(processes) > 1 and columns.elapsed == "_runtime":
        _remove_clock(processes)  # it includes the time between the processes
    if len(processes) == 1:
        processes[0].unix_time = parser.unix_time
    if not columns.steps:
        parsed.events += _times_between_evaluations(processes)
    if rows == _SAMPLED_ROWS:
        text = (
            f"The history has {rows} rows, the default number to which W&B's history() samples a "
            "longer one; scan_history() returns all of them."
        )
        parsed.events.append(warning("sampled", text))
    parsed.machine["columns_of"] = columns.program
    unused = [quoted(name) for name in table.columns if name and name not in known]
    if unused:
        more = len(unused) - _LISTED_COLUMNS
        listed = ", ".join(unused[:_LISTED_COLUMNS]) + (f" and {more} more" if more > 0 else "")
        parsed.machine["columns_not_used"] = listed
    return parsed


def _columns_of(path: Path, names: list[str]) -> LoggedColumns:
    for columns in PROGRAMS:
        if {columns.step, *columns.marks} <= set(names):
            return columns
    known = "; ".join(f"{', '.join((c.step, *c.marks))} ({c.program})" for c in PROGRAMS)
    raise BadInput(
        f"{path} has not the columns of a program whose history is known: {known}; "
        "export the whole history of one run."
    )


class _Parser:
    """Turn the rows of one history into records."""

    def __init__(self, columns: LoggedColumns, log: Collector) -> None:
        self.log = log
        self.unix_time: float | None = None
        """Start of W&B's run."""
        self._columns = columns
        # Only our mirror logs compilations, and every row's step, so that it can be seen where a
        # process resumed the run; its `hours` are those of all processes.
        self._is_mirror = bool(columns.compilations)
        self._latest_elapsed = self._earlier_processes = 0.0
        self._latest_step = 0

    def parse(self, number: int, row: _Row) -> None:
        """Parse one row: a step, an evaluation, or other values logged with them.

        Raises:
            ValueError: if a figure does not fit its column.
        """
        columns = self._columns
        count = row.get(columns.step)
        if count is not None:
            step = int(count) - columns.first_step
            if step < 0 or not count.is_integer():
                raise ValueError
            if self._is_mirror and self._resumes(row, step):
                self.log.begin_process(number, resumed=True)
            self._take(number, row, step, self._elapsed_seconds(row))
        if self.unix_time is None and "_timestamp" in row and "_runtime" in row:
            start = row["_timestamp"] - row["_runtime"]
            self.unix_time = start if 0 <= start < _LATEST_UNIX else None

    def _take(self, number: int, row: _Row, step: int, elapsed: float | None) -> None:
        columns, log = self._columns, self.log
        if figures := _fields(row, columns.evaluations):
            log.add_evaluation(number, LoggedEvaluation(step, elapsed_seconds=elapsed, **figures))
        if figures := _fields(row, columns.steps):
            if columns.program == "torchtitan" and step == 0:
                figures.pop("seconds", None)  # divided by the steps of a row, but it is only one
                figures.pop("tokens_per_second", None)
            log.add_step(number, LoggedStep(step, elapsed_seconds=elapsed, **figures))
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
        """Return the time of a row since its process started; None if the row has none.

        Raises:
            ValueError: if the time is negative or infinite.
        """
        elapsed = row.get(self._columns.elapsed)
        if elapsed is None:
            return None
        elapsed *= self._columns.elapsed_unit_seconds
        if not 0 <= elapsed < math.inf:
            raise ValueError
        self._latest_elapsed = max(self._latest_elapsed, elapsed)
        return elapsed - self._earlier_processes


def _fields(row: _Row, mapping: dict[str, str]) -> dict[str, float]:
    """Return the figures of the mapped columns by field.

    Raises:
        ValueError: if a time or rate is not above 0, or a figure that is no loss is infinite.
    """
    figures = {name: row[column] for column, name in mapping.items() if column in row}
    for name, value in figures.items():
        if not (math.isfinite(value) or name in _MAY_BE_INFINITE):
            raise ValueError
        if name in ("seconds", "tokens_per_second") and value <= 0:
            raise ValueError
    return figures


def _remove_clock(processes: list[LoggedProcess]) -> None:
    for process in processes:
        process.steps = [replace(s, elapsed_seconds=None) for s in process.steps]
        process.evaluations = [replace(e, elapsed_seconds=None) for e in process.evaluations]


def _times_between_evaluations(processes: list[LoggedProcess]) -> Iterator[Event]:
    """Yield an event per report row without a value, with the step time incl. evaluation."""
    seconds_per_step = [
        (b.elapsed_seconds - a.elapsed_seconds) / (b.step - a.step)
        for process in processes
        for a, b in pairwise(process.evaluations)
        if a.elapsed_seconds is not None and b.elapsed_seconds is not None
    ]
    reason = "there is a row at each evaluation only"
    if seconds_per_step:
        median = statistics.median(seconds_per_step)
        reason += f"; between them a step took {median:.4g} s, with its share of the evaluation"
    for row in ("step_seconds", "mfu_palm", "mfu_6n"):
        yield not_in_log(row, reason)

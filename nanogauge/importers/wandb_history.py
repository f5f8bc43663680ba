"""A run's history as W&B gives it out, as CSV or Parquet: one row for each call of log().

Columns mean what the program that logged them means. Those of nanoGPT, nanochat, torchtitan and of
our own mirror are known by their names; of all others nothing is guessed.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.errors import BadInput
from nanogauge.importers.parsed import (
    Collector,
    Evaluation,
    Form,
    Iteration,
    Printed,
    PrintedSession,
    clocked,
    number_of,
    warning,
)
from nanogauge.importers.text import TextLines, open_log, shown
from nanogauge.schema import Checkpoint, Compile, Event, Sensor
from nanogauge.sinks.rows import CHECKPOINT_KEYS, COMPILE_KEYS, EVAL_KEYS, SENSOR_KEYS

_Row_tables = dict[str, float]


class ColumnTable(Protocol):
    columns: list[str]
    too_long: list[int]

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row_tables | None]]:
        """Each row with its number: the figures in the wanted columns; None where it is damaged.

        Raises:
            BadInput: if the file is damaged as a whole.
        """


def open_table(path: Path, what: str) -> ColumnTable:
    """Open a table, whichever of the two it is.

    Raises:
        BadInput: if it cannot be read, or two of its columns bear one name.
    """
    with open_log(path, what) as file:
        is_parquet = file.read(4) == b"PAR1"
    table: ColumnTable = _Parquet(path) if is_parquet else _Csv(path, what)
    twice = [name for name, n in Counter(table.columns).items() if name and n > 1]
    if twice:
        raise BadInput(f"{path} has two columns {shown(min(twice))}; export one run alone.")
    return table


class _Csv:
    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._lines = TextLines(path, what)
        self.too_long = self._lines.too_long
        self._reader = csv.reader(f"{line}\n" for _, line in self._lines)
        header = next(self._guarded(), [])
        self.columns = _without_run_name(path, header)

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row_tables | None]]:
        for cells in self._guarded():
            if not cells:
                continue
            number = self._reader.line_num + len(self.too_long)
            row = None
            if len(cells) == len(self.columns):
                named = zip(self.columns, cells, strict=True)
                row = _figures({name: cell for name, cell in named if name in wanted})
            yield number, row

    def _guarded(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error:
            raise BadInput(
                f"line {self._reader.line_num} of {self._path} is no line of a CSV file; "
                "export it again."
            ) from None


def _without_run_name(path: Path, columns: list[str]) -> list[str]:
    """The columns of an exported chart bear the run's name, and its step another name."""
    named = {c.rsplit(" - ", 1)[0] for c in columns if " - " in c}
    if len(named) > 1:
        raise BadInput(f"{path} holds the columns of {len(named)} runs; export one run alone.")
    plain = [c.rsplit(" - ", 1)[-1] for c in columns]
    return ["_step" if c == "Step" and named else c for c in plain]


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        self.too_long: list[int] = []
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            self.columns: list[str] = list(self._file.schema_arrow.names)
        except self._errors:
            raise self._refused() from None

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row_tables | None]]:
        names = [name for name in self.columns if name in wanted]
        number = 0
        batches = self._file.iter_batches(batch_size=4096, columns=names)
        while True:
            try:
                batch = next(batches, None)
                found = [] if batch is None else batch.to_pylist()
            except self._errors:
                raise self._refused() from None
            if batch is None:
                return
            for row in found:
                number += 1
                yield number, _figures(row)

    def _refused(self) -> BadInput:
        return BadInput(f"{self._path} is a damaged Parquet file; export it again.")


def _figures(cells: dict[str, object]) -> _Row_tables | None:
    """The numbers of a row, without the empty ones; None where a cell holds anything else."""
    found: _Row_tables = {}
    for name, cell in cells.items():
        if cell is None or cell == "":
            continue
        try:
            if isinstance(cell, bool) or not isinstance(cell, str | int | float):
                return None
            value = number_of(cell) if isinstance(cell, str) else float(cell)
        except (ValueError, OverflowError):
            return None
        if not math.isnan(value):
            found[name] = value
    return found


CLOCK = ("_runtime", "_timestamp")
"""W&B's own: seconds since its run began, and the time of day"""


@dataclass(frozen=True)
class Flavour:
    """A program that logs to W&B; each mapping is from its column to a field of ours."""

    program: str
    step: str
    """the column that counts its steps"""
    marks: tuple[str, ...]
    """columns that no other program has together"""
    iteration: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, str] = field(default_factory=dict)
    sensor: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    compilation: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """column -> peak field of Session, and bytes per unit of the column"""
    energy_from_counter: str = ""
    """1 where the energy is the driver's counter, 0 where it is integrated power"""
    first_step: int = 0
    """the number of the first step in its count"""
    elapsed: str = "_runtime"
    """time since the run began"""
    elapsed_unit_seconds: float = 1.0
    compilation_inside: bool = False
    remarks: tuple[str, ...] = ()
    """what a reader of the report has to know"""

    @property
    def of_evaluations(self) -> bool:
        """It logs nothing between its evaluations."""
        return not self.iteration

    @property
    def known(self) -> set[str]:
        """All columns that are read."""
        mapped = {*self.iteration, *self.evaluation, *self.sensor, *self.checkpoint}
        mapped |= {*self.compilation, *self.peaks}
        single = {self.step, self.elapsed, self.energy_from_counter, *CLOCK}
        return {name for name in mapped | single if name}


_OTHER_MODEL = (
    "{}'s model is not the GPT of the configuration: parameters, FLOPs, MFU and every prediction "
    "are of the configuration that was given, and right as far as it is."
)


def _fields_of(keys: dict[str, str]) -> dict[str, str]:
    return {column: name for name, column in keys.items()}


FLAVOURS = (
    Flavour(
        program="nanogauge",
        step="step",
        marks=("perf/step_seconds",),
        iteration={
            "train/loss": "loss",
            "train/learning_rate": "learning_rate",
            "train/grad_norm": "grad_norm",
            "perf/step_seconds": "seconds",
            "perf/tokens_per_second": "tokens_per_second",
        },
        evaluation=_fields_of(EVAL_KEYS) | {"eval/val_bits_per_byte": "bits_per_byte"},
        sensor=_fields_of(SENSOR_KEYS),
        checkpoint=_fields_of(CHECKPOINT_KEYS),
        compilation=_fields_of(COMPILE_KEYS),
        peaks={
            "memory/peak_allocated_bytes": ("peak_allocated_bytes", 1),
            "memory/peak_reserved_bytes": ("peak_reserved_bytes", 1),
        },
        energy_from_counter="gpu/energy_from_counter",
        elapsed="hours",
        elapsed_unit_seconds=3600.0,
    ),
    Flavour(
        program="torchtitan",
        step="_step",
        marks=("loss_metrics/global_avg_loss",),
        iteration={
            "loss_metrics/global_avg_loss": "loss",
            "grad_norm": "grad_norm",
            "time_metrics/end_to_end(s)": "seconds",
            "throughput(tps)": "tokens_per_second",
        },
        first_step=1,
        peaks={"memory/max_reserved(GiB)": ("peak_reserved_bytes", 2**30)},
        remarks=(
            _OTHER_MODEL.format("torchtitan"),
            "A step's time is torchtitan's mean since its last row, with whatever lay between; the "
            "first row's is left out, because it is divided by steps that were not made.",
        ),
    ),
    Flavour(
        program="nanochat",
        step="step",
        marks=("train/dt", "total_training_time"),
        iteration={
            "train/loss": "loss",
            "train/dt": "seconds",
            "train/tok_per_sec": "tokens_per_second",
            "train/grad_norm": "grad_norm",
        },
        evaluation={"val/bpb": "bits_per_byte"},
        compilation_inside=True,
        remarks=(
            _OTHER_MODEL.format("nanochat"),
            "The losses are nanochat's running means.",
        ),
    ),
    Flavour(
        program="nanoGPT",
        step="iter",
        marks=("train/loss", "val/loss"),
        evaluation={"train/loss": "train_loss", "val/loss": "val_loss"},
    ),
)


def form_of(flavour: Flavour) -> Form:
    def events(run: list[PrintedSession]) -> list[Event]:
        said = [warning("columns", text) for text in flavour.remarks]
        if flavour.elapsed == "_runtime" and clocked(run):
            text = "The time of the whole is W&B's: from the start of its run to its last row."
            said.append(warning("clock", text))
        return said

    return Form(
        source="wandb_history",
        program=f"W&B history of {flavour.program}",
        what="the history of a W&B run",
        evaluation_inside=False,
        compilation_inside=flavour.compilation_inside,
        note="The history does not name its device or software: the device is as given on the "
        "command line.",
        events=events,
    )


def not_in_log(row: str, why: str) -> Event:
    return Event(what=NOT_IN_LOG, about=row, text=f"not in this log: {why}")


_LATEST_UNIX = 2**33  # the year 2242
_SAMPLED_ROWS = 500
"""what Run.history() of W&B's interface gives at most, unless it is asked for more"""
_LISTED_COLUMNS = 40
_Row = dict[str, float]


def read_wandb_history(path: Path) -> Printed:
    """Read a history that was exported as CSV or Parquet.

    Raises:
        BadInput: if the file cannot be read, is of no program that is known, or a row is damaged.
    """
    table = open_table(path, "the history of a W&B run")
    flavour = _flavour_of(path, table.columns)
    log = Collector(path)
    rows, clock = 0, _Clock(flavour)
    began: float | None = None
    for number, row in table.rows(flavour.known):
        rows += 1
        try:
            if row is None:
                raise ValueError
            _take(log, flavour, clock, number, row)
            if began is None and "_timestamp" in row and "_runtime" in row:
                moment = row["_timestamp"] - row["_runtime"]
                began = moment if 0 <= moment < _LATEST_UNIX else None
        except (ValueError, OverflowError):
            log.damage(number, "its cells are not what their columns hold")
    printed = log.finish(form_of(flavour), table.too_long, "a row of a step", steps_needed=False)
    sessions = printed.sessions
    if len(sessions) > 1 and flavour.elapsed == "_runtime":
        _forget_clock(sessions)  # it counts on over all processes
    if len(sessions) == 1:
        sessions[0].unix_time = began
    if flavour.of_evaluations:
        printed.events += _between_evaluations(sessions)
    if rows == _SAMPLED_ROWS:
        said = (
            f"The history has {rows} rows, as many as W&B's history() samples of a longer one; "
            "scan_history() gives all of them."
        )
        printed.events.append(warning("sampled", said))
    printed.told["columns_of"] = flavour.program
    known = flavour.known
    unused = [shown(name) for name in table.columns if name and name not in known]
    if unused:
        more = len(unused) - _LISTED_COLUMNS
        told = ", ".join(unused[:_LISTED_COLUMNS]) + (f" and {more} more" if more > 0 else "")
        printed.told["columns_not_used"] = told
    return printed


def _flavour_of(path: Path, columns: Sequence[str]) -> Flavour:
    for flavour in FLAVOURS:
        if {flavour.step, *flavour.marks} <= set(columns):
            return flavour
    known = "; ".join(f"{', '.join((f.step, *f.marks))} ({f.program})" for f in FLAVOURS)
    raise BadInput(
        f"{path} has not the columns of a program whose history is known: {known}; "
        "export the whole history of one run."
    )


class _Clock:
    """Seconds since the start of each process, from a column that counts over all of them.

    Only our mirror numbers its readings too, by the last step: where that falls back, the next
    process began.
    """

    def __init__(self, flavour: Flavour) -> None:
        self._flavour = flavour
        self._latest = self._before = 0.0
        self._step = 0

    def seconds(self, row: _Row) -> float | None:
        """Return the time of a row since its process began; None where the row has no clock.

        Raises:
            ValueError: if the row has a time that no clock gives.
        """
        elapsed = row.get(self._flavour.elapsed)
        if elapsed is None:
            return None
        elapsed *= self._flavour.elapsed_unit_seconds
        if not 0 <= elapsed < math.inf:
            raise ValueError
        self._latest = max(self._latest, elapsed)
        return elapsed - self._before if self._flavour.compilation else elapsed

    def restarted(self, row: _Row, step: int) -> bool:
        """Return True for the first row of a later process."""
        if not self._flavour.compilation or row.keys() & self._flavour.checkpoint.keys():
            return False  # a checkpoint's row is written late
        fell_back = step < self._step
        if fell_back:
            self._before = self._latest
        if fell_back or not row.keys() & self._flavour.evaluation.keys():
            self._step = step  # an evaluation's row stands one step ahead
        return fell_back


def _take(log: Collector, flavour: Flavour, clock: _Clock, line: int, row: _Row) -> None:
    """One row: a step, an evaluation, or what was read beside them.

    Raises:
        ValueError: if a figure cannot be what its column holds.
    """
    counted = row.get(flavour.step)
    if counted is None:
        return
    step = int(counted) - flavour.first_step
    if step < 0 or not counted.is_integer():
        raise ValueError
    if clock.restarted(row, step):
        log.begin(line, resumed=True)
    elapsed = clock.seconds(row)
    if found := _mapped(row, flavour.evaluation):
        log.evaluation(line, Evaluation(number=step, elapsed_seconds=elapsed, **found))
    if found := _mapped(row, flavour.iteration):
        if flavour.program == "torchtitan" and step == 0:
            found.pop("seconds", None)  # over as many steps as a row has, but only one was made
            found.pop("tokens_per_second", None)
        log.iteration(line, Iteration(number=step, elapsed_seconds=elapsed, **found))
    if found := _mapped(row, flavour.compilation):
        begun = log.current is not None
        at = step + 1 if begun else None  # its row stands at the step before
        log.other(Compile(elapsed_seconds=elapsed, step=at, mode="compiled", **found))
    if found := _mapped(row, flavour.sensor):
        sources = {0.0: "integral", 1.0: "counter"}
        source = sources.get(row.get(flavour.energy_from_counter, math.nan))
        values = {"elapsed_seconds": elapsed, "energy_source": source, **found}
        log.other(Sensor.model_validate(values))
    if found := _mapped(row, flavour.checkpoint):
        saved = {"elapsed_seconds": elapsed, "step": step, **found}
        log.other(Checkpoint.model_validate(saved))
    if (session := log.current) is not None:
        for name, (peak, unit_bytes) in flavour.peaks.items():
            if name in row:
                highest = max(round(row[name] * unit_bytes), getattr(session, peak) or 0)
                setattr(session, peak, highest)


def _mapped(row: _Row, columns: dict[str, str]) -> dict[str, float]:
    """The figures of these columns by our names; an infinite one is a loss, or none at all.

    Raises:
        ValueError: for a time that is not above 0, or anything else that is infinite.
    """
    found = {ours: row[theirs] for theirs, ours in columns.items() if theirs in row}
    for name, value in found.items():
        limitless = name in ("loss", "grad_norm", "train_loss", "val_loss", "bits_per_byte")
        if not (limitless or math.isfinite(value)):
            raise ValueError
        if name in ("seconds", "tokens_per_second") and value <= 0:
            raise ValueError
    return found


def _forget_clock(sessions: list[PrintedSession]) -> None:
    for session in sessions:
        session.iterations = [replace(e, elapsed_seconds=None) for e in session.iterations]
        session.evaluations = [replace(e, elapsed_seconds=None) for e in session.evaluations]


def _between_evaluations(sessions: list[PrintedSession]) -> Iterator[Event]:
    """What a step took together with its share of the evaluations, where no row tells more."""
    rates = [
        (b.elapsed_seconds - a.elapsed_seconds) / (b.number - a.number)
        for session in sessions
        for a, b in pairwise(session.evaluations)
        if a.elapsed_seconds is not None and b.elapsed_seconds is not None
    ]
    lacks = "there is a row at each evaluation only"
    if rates:
        lacks += (
            f"; between them a step took {statistics.median(rates):.4g} s, with its share of it"
        )
    for row in ("step_seconds", "mfu_palm", "mfu_6n"):
        yield not_in_log(row, lacks)

"""A run's history as W&B gives it out, as CSV or Parquet: one row for each call of log().

Columns mean what the program that logged them means. Those of nanoGPT, nanochat, torchtitan and of
our own mirror are known by their names; of all others nothing is guessed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.importers.parsed import (
    Collector,
    Evaluation,
    Iteration,
    Printed,
    PrintedSession,
    warning,
)
from nanogauge.importers.tables import open_table
from nanogauge.importers.text import shown
from nanogauge.importers.wandb_columns import FLAVOURS, Flavour, form_of, not_in_log
from nanogauge.schema import Checkpoint, Compile, Event, Sensor

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

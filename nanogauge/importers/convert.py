"""A run that another program printed -> the lines of our run log, its times taken apart again.

Some programs close a step's clock after the evaluation and checkpoint that may lie before it. The
steady step is then the median of those without an evaluation; what a step with one took beyond that
median is the evaluation (and checkpoint); what a process's first step took beyond an evaluation and
a step is compilation, or that step's own where nothing was compiled. What was done twice counts
once, and no time is made up for what no line has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.errors import BadInput
from nanogauge.importers.parsed import Form, PrintedSession, clocked, spacing_of, warning
from nanogauge.quantities import finite
from nanogauge.schema import Checkpoint, Compile, End, Eval, Event, LogLine, Start, Step


def run_lines(
    form: Form,
    run: list[PrintedSession],
    max_steps: int,
    compiled: bool,
    device: str,
    prediction_sha256: str,
) -> list[LogLine]:
    """The lines of our run log that say the same.

    Args:
        compiled: whether torch.compile was asked for.

    Raises:
        BadInput: if every printed time has more than a step in it, so that no step is clean.
    """
    parts = [_Times.of(form, session) for session in run]
    clean = [t for p in parts for i, t in p.timed.items() if i not in p.mixed]
    if not clean and any(p.timed for p in parts):
        raise BadInput("every printed iteration contains an evaluation; none shows a step alone.")
    steady = statistics.median(clean) if clean else None
    evaluating = [t - steady for p in parts for t in p.with_evaluation.values() if steady]
    usual = max(statistics.median(evaluating), 0.0) if evaluating else None
    lines: list[LogLine] = []
    for session, times in zip(run, parts, strict=True):
        start = Start(
            source=form.source,
            unix_time=session.unix_time,
            max_steps=max_steps,
            first_step=session.first,
            prediction_sha256=prediction_sha256,
            device=device,
        )
        rest = _session_lines(form, session, times, steady, usual, compiled)
        # In the order of time, where there is any: a process's last line tells how long it was.
        lines += [start, *sorted(rest, key=lambda line: line.elapsed_seconds or 0.0)]
    lines += [*_absent(run, timed=steady is not None), *_gaps(run), *form.events(run)]
    steps = run[-1].steps
    peaks = [s.peak_allocated_bytes for s in run if s.peak_allocated_bytes is not None]
    reserved = [s.peak_reserved_bytes for s in run if s.peak_reserved_bytes is not None]
    status: Literal["finished", "stopped"] = "finished" if steps >= max_steps else "stopped"
    lines.append(
        End(
            status=status,
            steps=steps,
            peak_allocated_bytes=max(peaks, default=None),
            peak_reserved_bytes=max(reserved, default=None),
        )
    )
    return lines


@dataclass(frozen=True)
class _Times:
    """The printed times of one process, by step."""

    timed: dict[int, float]
    mixed: set[int]
    """those that have, or may have, more than the step in them"""
    with_evaluation: dict[int, float]
    """those that hold a step and an evaluation, and nothing of a process's start"""
    first_evaluated: bool

    @classmethod
    def of(cls, form: Form, session: PrintedSession) -> _Times:
        timed = {e.number: e.seconds for e in session.iterations if e.seconds is not None}
        first = session.first
        evaluated = {e.number for e in session.evaluations} if form.evaluation_inside else set()
        mixed = evaluated & timed.keys()
        # Where a log begins late, the evaluation before its first step may have been cut off.
        if form.evaluation_inside or (form.compilation_inside and session.started):
            mixed |= {first} & timed.keys()
        inside = {i: timed[i] for i in evaluated & timed.keys() if i != first}
        return cls(timed, mixed, inside, first in evaluated)


def _session_lines(
    form: Form,
    session: PrintedSession,
    times: _Times,
    steady: float | None,
    usual_evaluation: float | None,
    compiled: bool,
) -> Iterator[LogLine]:
    first = times.timed.get(session.first)
    inside = usual_evaluation if times.first_evaluated else 0.0
    compiles = form.compilation_inside and session.started
    alone: float | None = None  # the first step, where nothing else is in what is left of its time
    if compiles and first is not None and inside is not None and not compiled:
        alone = max(first - inside, 0.0)
    elif compiles and first is not None and steady is not None and inside is not None:
        # else compilation and evaluation cannot be told apart
        left = first - steady - inside
        # That a resumed process compiled nothing, a log that lost its first step shows as well.
        if session.first == 0 or left > 0.1 * steady:
            yield Compile(seconds=max(left, 0.0), mode="compiled" if left > 0 else "eager")
    for entry in session.iterations:
        more = entry.number in times.mixed
        own = alone if entry.number == session.first else None
        yield Step(
            elapsed_seconds=entry.elapsed_seconds,
            step=entry.number,
            loss=_finite(entry.loss),
            step_seconds=own if more else entry.seconds,
            printed_seconds=entry.seconds if more else None,
            learning_rate=entry.learning_rate,
            grad_norm=_finite(entry.grad_norm),
        )
    for evaluation in session.evaluations:
        seconds = evaluation.seconds
        together = times.with_evaluation.get(evaluation.number)
        if together is not None and steady is not None:
            seconds = max(together - steady, 0.0)
        yield Eval(
            elapsed_seconds=evaluation.elapsed_seconds,
            step=evaluation.number,
            train_loss=_finite(evaluation.train_loss),
            val_loss=_finite(evaluation.val_loss),
            val_bits_per_byte=_finite(evaluation.bits_per_byte),
            seconds=seconds,
        )
    for step in session.checkpoints:
        yield Checkpoint(step=step)
    yield from session.others


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)


def _absent(run: list[PrintedSession], timed: bool) -> Iterator[Event]:
    """Why a row has no figure, where the log is not like our own."""
    if not timed:
        for row in ("step_seconds", "mfu_palm", "mfu_6n", "first_step_seconds"):
            yield Event(what=NOT_IN_LOG, about=row, text="not in this log: no step has a time")
        if not clocked(run):
            lacks = "not in this log: nothing in it has a time"
            yield Event(what=NOT_IN_LOG, about="total_seconds", text=lacks)
    printed = [entry.number for entry in run[0].iterations[:2]]
    first_is_apart = printed[:1] == [0] and printed[1:] > [1]
    if not clocked(run) and not first_is_apart:
        lacks = "not in this log: its lines have no clock"
        yield Event(what=NOT_IN_LOG, about="speedup_after_warmup", text=lacks)
    if run[0].first > 0:
        lacks = f"not in this log: it begins at step {run[0].first:,}"
        for row in ("first_step_seconds", "total_seconds"):
            yield Event(what=NOT_IN_LOG, about=row, text=lacks)


def _gaps(run: list[PrintedSession]) -> Iterator[Event]:
    """What is to be said where the log does not hold the run from its first step to its last."""
    begin = run[0]
    if begin.first > 0:
        yield warning(
            "begins_late",
            f"The log begins at step {begin.first:,}: what came before is not in it, and no figure "
            "of the whole run is made up from the rest.",
        )
    for before, after in pairwise(run):
        twice = max(before.steps - after.first, 0)
        said = f"The run was resumed at step {after.first:,} (line {after.line:,} of the log)"
        if twice:
            said += f": the {twice:,} steps from there on that had been made before count once"
        said += (
            "; the time of the interruption, of starting again and of steps made twice is not in "
            "the total."
        )
        yield warning("resumed", said, about="total_seconds")
    spacing = spacing_of(run)
    numbers = sorted({entry.number for session in run for entry in session.iterations})
    pairs = pairwise(numbers)
    wide = [(a, b) for a, b in pairs if spacing is not None and b - a > spacing]
    if wide:
        a, b = max(wide, key=lambda pair: pair[1] - pair[0])
        yield warning(
            "gap",
            f"The log goes from step {a:,} to {b:,}, and elsewhere by {spacing:,}: those between "
            "count with the median time, and evaluations among them not at all.",
            about="total_seconds",
        )

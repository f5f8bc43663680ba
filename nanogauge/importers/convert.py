"""Conversion of another program's records to lines of our run log.

Some programs stop a step's clock after the evaluation and checkpoint before it. The steady step is
then the median of the steps without an evaluation. What a step with an evaluation took beyond that
median is the evaluation. What a process's first step took beyond an evaluation and a steady step is
compilation, or that step's own time if nothing was compiled.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nanogauge.errors import BadInput
from nanogauge.importers.parsed import (
    Format,
    LoggedProcess,
    has_clock,
    log_interval,
    not_in_log,
    warning,
)
from nanogauge.quantities import finite
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Eval, Event, LogLine, Start, Step


def to_run_log(
    format: Format, run: list[LoggedProcess], spec: RunSpec, device: str
) -> list[LogLine]:
    """Return the run as lines of our log; start lines have no hash of the prediction yet.

    Raises:
        BadInput: if every printed time includes more than a step, so that no step is clean.
    """
    all_times = [_StepTimes.of(format, process) for process in run]
    clean = [t for times in all_times for i, t in times.printed.items() if i not in times.mixed]
    if not clean and any(times.printed for times in all_times):
        raise BadInput("every printed iteration contains an evaluation; none shows a step alone.")
    steady = statistics.median(clean) if clean else None
    evaluations = [
        t - steady for times in all_times for t in times.with_evaluation.values() if steady
    ]
    usual_evaluation = max(statistics.median(evaluations), 0.0) if evaluations else None
    lines: list[LogLine] = []
    for process, times in zip(run, all_times, strict=True):
        start = Start(
            source=format.source,
            unix_time=process.unix_time,
            max_steps=spec.steps,
            first_step=process.first_step,
            prediction_sha256="",
            device=device,
        )
        rest = _process_lines(format, process, times, steady, usual_evaluation, bool(spec.compile))
        # By time, because the last line of a process determines its duration.
        lines += [start, *sorted(rest, key=lambda line: line.elapsed_seconds or 0.0)]
    lines += [*_absent(run, timed=steady is not None), *_gaps(run), *format.events(run)]
    updates = run[-1].updates
    peaks = [p.peak_allocated_bytes for p in run if p.peak_allocated_bytes is not None]
    reserved = [p.peak_reserved_bytes for p in run if p.peak_reserved_bytes is not None]
    status: Literal["finished", "stopped"] = "finished" if updates >= spec.steps else "stopped"
    lines.append(
        End(
            status=status,
            steps=updates,
            peak_allocated_bytes=max(peaks, default=None),
            peak_reserved_bytes=max(reserved, default=None),
        )
    )
    return lines


@dataclass(frozen=True)
class _StepTimes:
    """Printed seconds of one process's steps, by step number."""

    printed: dict[int, float]
    mixed: set[int]
    """Steps whose printed time includes, or may include, more than the step."""
    with_evaluation: dict[int, float]
    """Step number -> printed time of the step and an evaluation, without process start-up."""
    first_evaluated: bool

    @classmethod
    def of(cls, format: Format, process: LoggedProcess) -> _StepTimes:
        printed = {s.step: s.seconds for s in process.steps if s.seconds is not None}
        first = process.first_step
        evaluated = {e.step for e in process.evaluations} if format.evaluation_inside else set()
        mixed = evaluated & printed.keys()
        # If a log begins late, the evaluation before its first step may have been cut off.
        if format.evaluation_inside or (format.compilation_inside and process.start_logged):
            mixed |= {first} & printed.keys()
        with_evaluation = {i: printed[i] for i in evaluated & printed.keys() if i != first}
        return cls(printed, mixed, with_evaluation, first in evaluated)


def _process_lines(
    format: Format,
    process: LoggedProcess,
    times: _StepTimes,
    steady: float | None,
    usual_evaluation: float | None,
    compiled: bool,
) -> Iterator[LogLine]:
    first = times.printed.get(process.first_step)
    evaluation = usual_evaluation if times.first_evaluated else 0.0
    first_step_seconds: float | None = None
    if format.compilation_inside and process.start_logged:
        if first is None or evaluation is None:
            pass  # compilation and evaluation cannot be separated
        elif not compiled:
            first_step_seconds = max(first - evaluation, 0.0)
        elif steady is not None:
            compilation = first - steady - evaluation
            # A resumed process without compilation looks like a log that lost its first step.
            if process.first_step == 0 or compilation > 0.1 * steady:
                mode: Literal["compiled", "eager"] = "compiled" if compilation > 0 else "eager"
                yield Compile(seconds=max(compilation, 0.0), mode=mode)
    for step in process.steps:
        mixed = step.step in times.mixed
        own = first_step_seconds if step.step == process.first_step else None
        yield Step(
            elapsed_seconds=step.elapsed_seconds,
            step=step.step,
            loss=_finite(step.loss),
            step_seconds=own if mixed else step.seconds,
            printed_seconds=step.seconds if mixed else None,
            learning_rate=step.learning_rate,
            grad_norm=_finite(step.grad_norm),
        )
    for logged in process.evaluations:
        seconds = logged.seconds
        together = times.with_evaluation.get(logged.step)
        if together is not None and steady is not None:
            seconds = max(together - steady, 0.0)
        yield Eval(
            elapsed_seconds=logged.elapsed_seconds,
            step=logged.step,
            train_loss=_finite(logged.train_loss),
            val_loss=_finite(logged.val_loss),
            val_bits_per_byte=_finite(logged.bits_per_byte),
            seconds=seconds,
        )
    for updates in process.checkpoints:
        yield Checkpoint(step=updates)
    yield from process.other_lines


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)


def _absent(run: list[LoggedProcess], timed: bool) -> Iterator[Event]:
    """Yield an event for each report row that the log has no value for."""
    if not timed:
        for row in ("step_seconds", "mfu_palm", "mfu_6n", "first_step_seconds"):
            yield not_in_log(row, "no step has a time")
    if not has_clock(run) and not timed:
        yield not_in_log("total_seconds", "nothing in it has a time")
    if run[0].first_step > 0:
        for row in ("first_step_seconds", "total_seconds"):
            yield not_in_log(row, f"it begins at step {run[0].first_step:,}")


def _gaps(run: list[LoggedProcess]) -> Iterator[Event]:
    """Yield a warning for each part of the run that the log lacks or contains twice."""
    if run[0].first_step > 0:
        yield warning(
            "begins_late",
            f"The log begins at step {run[0].first_step:,}: no figure of the whole run can be "
            "computed from it.",
        )
    for before, after in pairwise(run):
        text = f"The run was resumed at step {after.first_step:,} (line {after.line:,} of the log)"
        if (repeated := before.updates - after.first_step) > 0:
            text += f": the {repeated:,} steps that were made twice count once"
        text += (
            "; the time of the interruption, of the second start and of repeated steps is not in "
            "the total."
        )
        yield warning("resumed", text, about="total_seconds")
    interval = log_interval(run)
    numbers = sorted({step.step for process in run for step in process.steps})
    holes = [(a, b) for a, b in pairwise(numbers) if interval is not None and b - a > interval]
    if holes:
        a, b = max(holes, key=lambda hole: hole[1] - hole[0])
        yield warning(
            "gap",
            f"The log goes from step {a:,} to {b:,}, and elsewhere by {interval:,}: steps between "
            "count with the median time, and evaluations between are not counted.",
            about="total_seconds",
        )

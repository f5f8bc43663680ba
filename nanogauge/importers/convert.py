"""Conversion of another program's records to lines of our run log.

Some programs stop a step's clock after the evaluation and checkpoint before it. The steady step is then the median of
the steps without an evaluation. What a step with an evaluation took beyond that median is the evaluation. What a
process's first step took beyond an evaluation and a steady step is compilation, or that step's own time if nothing was
compiled.
"""

import math
import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from nanogauge.analysis.measured import NON_FINITE, NOT_IN_LOG
from nanogauge.importers.described import evaluation_spacing
from nanogauge.importers.formats import Format
from nanogauge.importers.parsed import LoggedEvaluation, LoggedProcess, has_clock, log_interval, not_in_log, warning
from nanogauge.quantities import finite
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Event, LogLine, Start


def to_run_log(format: Format, run: list[LoggedProcess], spec: RunSpec, device: str) -> list[LogLine]:
    """Return the run as lines of our log; start lines have no hash of the prediction yet."""
    gaps = list(_gaps(format, run))
    all_times = [_StepTimes(format, process) for process in run]
    clean = [t for times in all_times for i, t in times.printed.items() if i not in times.mixed]
    steady = statistics.median(clean) if clean else None
    evaluations = [t - steady for x in all_times for t in x.with_evaluation.values() if steady]
    evaluation = max(statistics.median(evaluations), 0.0) if evaluations else None
    lines: list[LogLine] = []
    for process, times in zip(run, all_times, strict=True):
        start = Start(
            source=format.source,
            max_steps=spec.steps,
            first_step=process.first_step,
            prediction_sha256="",
            device=device,
        )
        rest = _process_lines(format, process, times, steady, evaluation, spec.compile is not False)
        # By time, because the last line of a process determines its duration.
        lines += [start, *sorted(rest, key=lambda line: line.elapsed_seconds or 0.0)]
    timed = any(times.printed for times in all_times)
    lines += [*absent_events(run, timed, steady), *gaps, *remarks(format, run)]
    updates = run[-1].updates
    end = End(
        elapsed_seconds=run[0].total_seconds if len(run) == 1 else None,
        status="finished" if updates >= spec.steps else "stopped",
        steps=updates,
        peak_allocated_bytes=max(p.peak_allocated_bytes or 0 for p in run) or None,
        peak_reserved_bytes=max(p.peak_reserved_bytes or 0 for p in run) or None,
    )
    return [*lines, end]


class _StepTimes:
    """Printed seconds of one process's steps, by step number."""

    def __init__(self, format: Format, process: LoggedProcess) -> None:
        self.printed = {s.step: s.seconds for s in process.steps if s.seconds is not None}
        first = process.first_step
        inside = "evaluation" in format.step_time
        evaluated = {e.step for e in process.evaluations} if inside else set()
        self.mixed = evaluated & self.printed.keys()
        """Steps whose printed time includes, or may include, more than the step."""
        self.with_evaluation = {i: self.printed[i] for i in self.mixed if i != first}
        # If a log begins late, the evaluation before its first step may have been cut off.
        if inside or ("compilation" in format.step_time and process.start_logged):
            self.mixed |= {first} & self.printed.keys()
        self.first_evaluated = first in evaluated


def _process_lines(
    format: Format,
    process: LoggedProcess,
    times: _StepTimes,
    steady: float | None,
    usual_evaluation: float | None,
    compiled: bool,
) -> Iterator[LogLine]:
    begin = process.first_step
    first = times.printed.get(begin)
    evaluation = usual_evaluation if times.first_evaluated else 0.0
    own: float | None = None
    # Else compilation and evaluation cannot be separated.
    if "compilation" in format.step_time and process.start_logged and first and evaluation is not None:
        if not compiled:
            own = max(first - evaluation, 0.0)
        elif steady is not None:
            compilation = first - steady - evaluation
            # A resumed process without compilation looks like a log that lost its first step.
            if begin == 0 or compilation > 0.1 * steady:
                mode: Literal["compiled", "eager"] = "compiled" if compilation > 0 else "eager"
                yield Compile(seconds=max(compilation, 0.0), mode=mode)
    for step in process.steps:
        mixed = step.step in times.mixed
        yield step.to_line(step.seconds if not mixed else own if step.step == begin else None)
    for logged in process.evaluations:
        seconds = logged.seconds
        together = times.with_evaluation.get(logged.step)
        if together is not None and steady is not None:
            seconds = max(together - steady, 0.0)
        yield logged.to_line(seconds)
    yield from (Checkpoint(step=updates) for updates in sorted(process.checkpoints))
    yield from process.other_lines


def absent_events(run: list[LoggedProcess], timed: bool, steady: float | None) -> Iterator[Event]:
    """Yield an event for each report row that the log has no value for."""
    if steady is None:
        reason = "no step has a time"
        if timed:
            reason = "every printed time includes an evaluation or compilation"
        for row in ("step_seconds", "mfu_palm", "mfu_6n"):
            yield not_in_log(row, reason)
        if not timed:
            yield not_in_log("first_step_seconds", reason)
    if not has_clock(run) and steady is None and run[0].total_seconds is None:
        yield not_in_log("total_seconds", "nothing in it has a time")
    if run[0].first_step > 0 and run[0].total_seconds is None:
        for row in ("first_step_seconds", "total_seconds"):
            yield not_in_log(row, f"it begins at step {run[0].first_step:,}")


def remarks(format: Format, run: list[LoggedProcess]) -> Iterator[Event]:
    """Yield what the format and the program's own figures say about the run."""
    for text in format.remarks:
        yield warning("remark", text)
    seconds = max(process.training_seconds or 0.0 for process in run)
    own = f"{format.title}'s own sum is {seconds:,.1f} s of training in {run[-1].updates:,} steps"
    for row, reason in format.absent.items():
        yield not_in_log(row, f"{reason} ({own})" if seconds else reason)
    if seconds and not format.absent:
        yield warning("training_time", f"{own}.")
    evaluated = [process.accuracy for process in run if process.accuracy is not None]
    if evaluated:
        text = f"HellaSwag is {evaluated[-1][1]:.4f} after {evaluated[-1][0]:,} steps by the"
        text += " program's own evaluation, which is not comparable with ours"
        yield Event(what=NOT_IN_LOG, about="quality_vs_gpt2", text=text)
    printed = [100 * m for p in run for s in p.steps if (m := finite(s.mfu)) is not None]
    if printed:
        text = f"{min(printed):.1f}-{max(printed):.1f} %, {format.mfu_note}"
        if max(printed) == 0:
            text = f"0.00 %, because {format.title} does not know this card's peak"
        yield Event(what="logged_mfu", about="mfu_palm", text=f"the log itself printed {text}")
    losses = [(s.step, s.loss) for process in run for s in process.steps if s.loss is not None]
    last = next((i for i, (_, x) in reversed([*enumerate(losses)]) if math.isfinite(x)), -1)
    if losses and last < len(losses) - 1:
        text = f"No loss is finite from step {losses[last + 1][0]:,} on"
        if last >= 0:
            text += f"; the last finite one is {losses[last][1]:.4g} at step {losses[last][0]:,}"
        yield warning(NON_FINITE, f"{text}.")


def _gaps(format: Format, run: list[LoggedProcess]) -> Iterator[Event]:
    """Yield a warning for each part of the run that the log lacks or contains twice.

    Evaluations that a hole hides are added to the run, without values.
    """
    if (first := run[0].first_step) > 0:
        yield warning("begins_late", f"The log begins at step {first:,}, and lacks what is before.")
    for before, after in pairwise(run):
        text = f"The run was resumed at step {after.first_step:,} (line {after.line:,} of the log)"
        if (repeated := before.updates - after.first_step) > 0:
            text += f": the {repeated:,} steps that were made twice count once"
        text += "; the time of the interruption, of the second start and of repeated steps is not"
        yield warning("resumed", f"{text} in the total.", about="total_seconds")
    interval, spacing = log_interval(run), evaluation_spacing(run)
    numbers = sorted({step.step for process in run for step in process.steps})
    holes = [(a, b) for a, b in pairwise(numbers) if interval is not None and b - a > interval]
    if not holes:
        return
    a, b = max(holes, key=lambda hole: hole[1] - hole[0])
    text = f"The log goes from step {a:,} to {b:,}, and elsewhere by {interval:,}: steps between"
    text += " count with the median time"
    logged = {e.step for process in run for e in process.evaluations}
    due = [] if spacing is None else range(0, numbers[-1] + 1, spacing)
    hidden = [k for k in due if k not in logged and any(a < k <= b for a, b in holes)]
    if hidden:
        text += f", and {len(hidden):,} evaluations between, one every {spacing:,} steps, too."
        for process in run:
            inside = [k for k in hidden if process.first_step < k <= process.last_step]
            process.evaluations += [LoggedEvaluation(k) for k in inside]
            process.evaluations.sort(key=lambda evaluation: evaluation.step)
    elif spacing is None and logged and "evaluation" in format.step_time:
        text += "."
        yield not_in_log("total_seconds", f"steps {a:,} to {b:,}, or how often the run evaluated")
    else:
        text += "; no evaluation is due between."
    yield warning("gap", text, about="total_seconds")

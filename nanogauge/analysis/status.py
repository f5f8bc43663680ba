"""Status of an unfinished run: is it alive, when will it end, and what did it do last?

A killed process logs nothing about it. The lock of the run folder shows whether the process lives; in a folder without
a lock, only the time since its last log line does.
"""

import statistics
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.analysis.measured import Measurements
from nanogauge.quantities import FAR_SECONDS, Interval, day_and_time, format_range, format_seconds, format_value
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations, is_checkpointed, is_evaluated
from nanogauge.schema import Checkpoint, Eval, Prediction, Stored

STRETCHES = 20
"""Equal parts of the steady steps whose mean step times are compared, to estimate their spread."""
RUNNING_TIMES, RUNNING_SECONDS = 3, 10
"""A run counts as alive until silent for this multiple of its longest work, plus these seconds."""
DIED_TIMES, DIED_SECONDS = 20, 300
"""A run counts as dead or hung once silent for this multiple of its longest work and these seconds."""
DEFAULT_WORK_SECONDS = 600
"""Longest expected time between log lines if there is neither a step nor a prediction."""
LONGEST_EVENT_TEXT = 300
EVENTS_SHOWN = 5

_FLOPS = ("flops_total_6n", "flops_total_palm", "flops_total_traced")
TOTALS = ("tokens_total", "data_epochs", *_FLOPS, "energy_kwh", "cost", "co2_grams")
"""Row ids of whole-run totals, which have a value from the first step on."""

State = Literal["running", "silent", "hung", "died"]


class Liveness(Stored):
    """State of a run without an end line, judged by its lock and its last log line."""

    state: State
    last_line_age_s: float
    why: str
    certain: bool
    """True if judged by the folder's lock; False if only by the time since the last log line."""


class Projection(Stored):
    total_s: float
    low_s: float
    high_s: float
    left_s: float
    """Remaining part of total_s, in seconds."""
    how: str


class ShownEvent(Stored):
    what: str
    step: int | None
    elapsed_seconds: float | None
    """Time since the start of the process that logged the event."""
    text: str


def without_totals(measurements: Measurements, spec: RunSpec) -> Measurements:
    """Return the measurements with whole-run totals of an unfinished run moved to `missing`."""
    if measurements.status == "finished":
        return measurements
    done = f"{spec.progress(measurements.steps_done)} steps"
    values, missing = dict(measurements.values), dict(measurements.missing)
    for row in TOTALS:
        if (so_far := values.pop(row, None)) is not None:
            text = format_value(row, so_far.value, spec.cost.currency)
            missing[row] = f"{text} so far, after {done}"
    return measurements.model_copy(update={"values": values, "missing": missing})


def judge_liveness(
    recorded: RunHistory, prediction: Prediction, written_unix: float, now_unix: float, lock_held: bool | None = None
) -> Liveness | None:
    """Return the state of a run; None if its log has an end line or was imported.

    Args:
        written_unix: when the log was last written to.
        lock_held: whether a process holds the folder's lock; None for a folder without one.
    """
    if recorded.end is not None or not recorded.starts[0].is_live:
        return None
    age = max(now_unix - written_unix, 0.0)
    last_line = f"last line {format_seconds(age)} ago"
    if lock_held is False:
        why = f"its process is gone: no process on this machine holds the run's lock ({last_line})"
        return Liveness(state="died", last_line_age_s=age, why=why, certain=True)
    longest, what = _longest_work(recorded, prediction)
    why = f"no line for {format_seconds(age)}, {what} {format_seconds(longest)}"
    if lock_held:
        why = f"its process is alive, but {why}"
    state: State = "silent"
    if age <= RUNNING_TIMES * longest + RUNNING_SECONDS:
        state, why = "running", last_line
    elif age > max(DIED_TIMES * longest, DIED_SECONDS):
        state = "hung" if lock_held else "died"
    return Liveness(state=state, last_line_age_s=age, why=why, certain=lock_held is not None)


def _longest_work(recorded: RunHistory, prediction: Prediction) -> tuple[float, str]:
    """Return the longest time between log lines to expect, and its description."""
    steps = recorded.steps.known("step_seconds")
    if not len(steps):
        first = prediction.best("first_step_seconds")
        if first is None:
            return DEFAULT_WORK_SECONDS, "and its first step was given"
        return first.high, "while the first step was predicted to take at most"
    done = [
        float(steps.max()),
        *(c.seconds for c in recorded.compiles),
        *(e.seconds for e in recorded.evals if e.seconds is not None),
        *(c.seconds for c in recorded.checkpoints if c.seconds is not None),
    ]
    return max(done), "while the longest piece of work before took"


def project_total(
    recorded: RunHistory, spec: RunSpec, prediction: Prediction, measurements: Measurements
) -> Projection | None:
    """Extrapolate the total time from the run so far; None without a steady step or a clock.

    The interval takes all remaining parts at their low ends together, or at their high ends.
    """
    done, ran = measurements.steps_done, measurements.ledger.ran_s
    if ran is None or not measurements.timed_whole:
        return None
    pace = _pace(steady_seconds(recorded), prediction)
    if pace is None:
        return None
    evaluated = {e.step for e in recorded.evals if e.step >= done and is_evaluated(e.step, spec)}
    saved = {c.step for c in recorded.checkpoints if c.step >= done}
    saves_left = checkpoints(spec, first=done) - sum(is_checkpointed(step, spec) for step in saved)
    left_seconds = Interval.exact(0.0)
    pieces = []
    for name, count, each in (
        ("step", spec.steps - done, pace),
        ("evaluation", evaluations(spec, first=done) - len(evaluated), _spread(recorded.evals)),
        ("checkpoint", saves_left, _spread(recorded.checkpoints)),
    ):
        if each is None or count == 0:
            continue
        left_seconds += count * each
        spread = format_range("step_seconds", each.low, each.high)
        pieces.append(f"{count:,} {name}{'s' * (count > 1)} of {spread}")
    total = ran + left_seconds
    return Projection(
        total_s=total.expected,
        low_s=total.low,
        high_s=total.high,
        left_s=left_seconds.expected,
        how=f"{format_seconds(ran)} so far, and still to come {', '.join(pieces) or 'nothing'}",
    )


def _pace(seconds: npt.NDArray[np.float64], prediction: Prediction) -> Interval | None:
    """Estimate the duration of the remaining steps from the mean step times of 20 parts of the run.

    The two extreme stretches are ignored. With fewer steps, the interval is at least as wide, in proportion, as the
    predicted one.
    """
    if not len(seconds):
        return None
    if len(seconds) < STRETCHES:
        median = float(np.median(seconds))
        low, high = float(seconds.min()), float(seconds.max())
        step = prediction.best("step_seconds")
        if step is not None:
            predicted = step.scaled(median)
            low, high = min(low, predicted.low), max(high, predicted.high)
        return Interval(low, median, high)
    means = sorted(float(part.mean()) for part in np.array_split(seconds, STRETCHES))
    return Interval(means[1], statistics.median(means), means[-2])


def _spread(lines: Sequence[Eval] | Sequence[Checkpoint]) -> Interval | None:
    """Return the shortest, median and longest duration of timed log lines; None without any."""
    timed = [line.seconds for line in lines if line.seconds is not None]
    return Interval(min(timed), statistics.median(timed), max(timed)) if timed else None


def last_events(recorded: RunHistory, measurements: Measurements) -> list[ShownEvent]:
    """Return the last step, evaluation, checkpoint and events of an unfinished run."""
    last: list[ShownEvent] = []

    def add(what: str, step: int | None, elapsed_seconds: float | None, text: str) -> None:
        text = text if len(text) <= LONGEST_EVENT_TEXT else text[:LONGEST_EVENT_TEXT] + " ..."
        last.append(ShownEvent(what=what, step=step, elapsed_seconds=elapsed_seconds, text=text))

    if recorded.steps:
        step = recorded.steps[-1]
        loss = "no finite loss" if step.loss is None else f"loss {step.loss:.4g}"
        took = "" if step.step_seconds is None else f", {format_seconds(step.step_seconds)}"
        add("step", step.step, step.elapsed_seconds, loss + took)
    for evaluated in recorded.evals[-1:]:
        value = evaluated.val_loss
        text = "no finite validation loss" if value is None else f"validation loss {value:.4g}"
        if evaluated.final is not None:
            text += f", forecast of the final one {evaluated.final:.3f}"
        add("evaluation", evaluated.step, evaluated.elapsed_seconds, text)
    for saved in recorded.checkpoints[-1:]:
        since = measurements.steps_done - saved.step
        text = "no step since"
        if since > 0:
            text = f"{since:,} steps since; a resumed run repeats them"
        add("checkpoint", saved.step, saved.elapsed_seconds, text)
    events = [e for e in recorded.events if e.what != "sample"]
    for event in events[-EVENTS_SHOWN:]:
        add(event.what.replace("_", " "), event.step, event.elapsed_seconds, event.text)
    if (end := recorded.end) is not None:
        add(end.status, end.steps, end.elapsed_seconds, end.reason or "the log gives no reason")
    return last


def unfinished_headline(
    measurements: Measurements,
    spec: RunSpec,
    prediction: Prediction,
    liveness: Liveness | None,
    projection: Projection | None,
    now: datetime,
) -> str:
    """Return a sentence on how far the run is, and when it ends or would have ended."""
    where = f"step {spec.progress(measurements.steps_done)}"
    ran = measurements.ledger.ran_s
    if ran is not None and measurements.timed_whole:
        where += f" after {format_seconds(ran)}"
    running = liveness is not None and liveness.state == "running"
    if liveness is None:
        word = {"stopped": "Stopped", "failed": "Failed"}.get(measurements.status, "The log ends")
        text = f"{word} at {where}."
    elif running:
        text = f"Running, {liveness.why}: {where}."
    else:
        word = {"died": "Died", "hung": "Hangs", "silent": "Silent"}[liveness.state]
        doubt = ", and perhaps dead" * (liveness.state == "silent" and not liveness.certain)
        text = f"{word} at {where}{doubt}: {liveness.why}."
    if projection is None:
        return text
    total = projection_text(projection.total_s, projection.low_s, projection.high_s)
    if liveness is None or not running:
        return f"{text} At the measured pace the whole run takes {total}."
    ahead = projection.left_s - liveness.last_line_age_s
    done = now + timedelta(seconds=ahead) if ahead <= FAR_SECONDS else None
    text += f" At this pace the whole run takes {total}, done {day_and_time(done, now)}"
    predicted = prediction.best("total_seconds")
    if predicted is None:
        return f"{text}."
    inside = predicted.contains(projection.total_s)
    interval = format_range("total_seconds", predicted.low, predicted.high)
    return f"{text}; {'inside' if inside else 'outside'} the predicted {interval}."


def projection_text(total: float, low: float | None, high: float | None) -> str:
    """Format a projected time with its interval."""
    text = format_seconds(total)
    if low is None or high is None:
        return text
    interval = format_range("total_seconds", low, high)
    if interval == text:
        interval = f"within {100 * max(total - low, high - total) / total:.2g} %"
    return f"{text} ({interval})"

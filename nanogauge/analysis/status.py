"""A run that has not finished: whether it still runs, how it will end, and what it last did.

Each figure says on what it stands. A process that was killed writes no line about it: that it died
is known from the lock of its folder, which it held while it lived. In a folder without one it is
inferred from a silence that is long beside anything the run did before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.analysis.measured import Measurements
from nanogauge.prediction.overheads import waiting_seconds
from nanogauge.quantities import (
    FAR_SECONDS,
    Interval,
    day_and_time,
    format_range,
    format_seconds,
    format_value,
)
from nanogauge.runlog.history import Recorded
from nanogauge.runlog.lock import is_locked
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations, is_checkpointed, is_evaluated
from nanogauge.schema import Prediction, Stored

STRETCHES = 20
"""into so many the steady steps are cut, to see how much the pace of one differs from another's"""
RUNNING_TIMES, RUNNING_SECONDS = 3, 10
"""silent for less than so many times its longest piece of work, and so much more: it runs"""
DIED_TIMES, DIED_SECONDS = 20, 300
"""silent for longer than so many times that, and longer than so much: it died"""
UNSEEN_WORK_SECONDS = 600
"""the longest piece of work of a run that has shown none and has no prediction"""
LONGEST_EVENT_TEXT = 300
EVENTS_SHOWN = 5

TOTALS = (
    "tokens_total",
    "data_epochs",
    "flops_total_6n",
    "flops_total_palm",
    "energy_kwh",
    "cost",
)
"""rows about the whole run that have a figure from its first step on"""

State = Literal["running", "silent", "hung", "died"]


class Silence(Stored):
    """How long a log without an end line was not written to, and what follows from it."""

    state: State
    last_line_age_s: float
    why: str
    certain: bool
    """whether the lock of the folder says if the process lives; else the silence alone"""


class Projection(Stored):
    total_s: float
    low_s: float
    high_s: float
    left_s: float
    """of total_s: what is still to come"""
    how: str


class LastEvent(Stored):
    what: str
    step: int | None
    elapsed_seconds: float | None
    """since the process began that logged it"""
    text: str


def without_totals(measurements: Measurements, spec: RunSpec) -> Measurements:
    """Of a run that has not finished: what it came to so far is no figure of the whole run.

    Held against a total that was predicted or claimed it would be a miss that is none.
    """
    if measurements.status == "finished":
        return measurements
    done = f"{measurements.steps_done:,} of {spec.steps:,} steps"
    missing = dict(measurements.missing)
    for row in TOTALS:
        if (so_far := measurements.values.get(row)) is not None:
            text = format_value(row, so_far.value, spec.cost.currency)
            missing[row] = f"{text} so far, after {done}"
    values = {row: figure for row, figure in measurements.values.items() if row not in TOTALS}
    return measurements.model_copy(update={"values": values, "missing": missing})


def silence(
    recorded: Recorded,
    prediction: Prediction,
    written_unix: float,
    now_unix: float,
    alive: bool | None = None,
) -> Silence | None:
    """Whether the run still runs; None where its log says how it ended, or is another program's.

    Args:
        written_unix: when the log was last written to.
        now_unix: the moment to judge it at.
        alive: whether its process is there, as process_is_there says.
    """
    if recorded.end is not None or recorded.starts[0].source != "train":
        return None
    age = max(now_unix - written_unix, 0.0)
    ago = f"last line {format_seconds(age)} ago"
    if alive is False:
        why = f"its process is gone, none on this machine holds the run's lock ({ago})"
        return Silence(state="died", last_line_age_s=age, why=why, certain=True)
    longest, what = _longest_work(recorded, prediction)
    why = f"no line for {format_seconds(age)}, {what} {format_seconds(longest)}"
    if alive:
        why = f"its process is there, but {why}"
    state: State = "silent"
    if age <= RUNNING_TIMES * longest + RUNNING_SECONDS:
        state, why = "running", ago
    elif age > max(DIED_TIMES * longest, DIED_SECONDS):
        state = "hung" if alive else "died"
    return Silence(state=state, last_line_age_s=age, why=why, certain=alive is not None)


def process_is_there(folder: Path) -> bool | None:
    """Whether the process of a run lives; None in a folder that never had a lock.

    Such a folder is older, was imported, or was copied without it.
    """
    return is_locked(folder)


def _longest_work(recorded: Recorded, prediction: Prediction) -> tuple[float, str]:
    """The longest time in which this run had nothing to log, or may have had."""
    steps = recorded.steps.known("step_seconds")
    if not len(steps):
        first = prediction.best("first_step_seconds")
        if first is None:
            return UNSEEN_WORK_SECONDS, "and its first step was given"
        return first.high, "while the first step was predicted to take at most"
    seen = [
        float(steps.max()),
        *(c.seconds for c in recorded.compiles),
        *(e.seconds for e in recorded.evals if e.seconds is not None),
        *(c.seconds for c in recorded.checkpoints if c.seconds is not None),
    ]
    return max(seen), "while the longest piece of work before took"


def project(
    recorded: Recorded, spec: RunSpec, prediction: Prediction, measurements: Measurements
) -> Projection | None:
    """The total of a run that goes on to its last step, from what it showed so far.

    Every part that is still to come lies at its low end, or every one at its high end: the ends of
    the interval are those of parts that slow down together. None without a steady step, or
    where the log does not tell what the run took so far.
    """
    done, ran = measurements.steps_done, measurements.ledger.ran_s
    if ran is None or not measurements.timed_whole:
        return None
    pace = _pace(steady_seconds(recorded), prediction)
    if pace is None:
        return None
    left = spec.steps - done
    evaluated = {e.step for e in recorded.evals if e.step >= done and is_evaluated(e.step, spec)}
    evals_left = evaluations(spec, first=done) - len(evaluated)
    saved = {c.step for c in recorded.checkpoints if c.step >= done}
    saves_left = checkpoints(spec, first=done) - sum(is_checkpointed(step, spec) for step in saved)
    evaluation = _spread([e.seconds for e in recorded.evals])
    if evaluation is None:
        evaluation = _predicted_evaluation(spec, prediction)
    saving = _spread([c.seconds for c in recorded.checkpoints])
    if saving is None and recorded.starts[0].source == "train":
        saving = _predicted_checkpoint(spec, prediction)
    left_seconds = Interval.exact(0.0)
    pieces = []
    for name, count, each in (
        ("step", left, pace),
        ("evaluation", evals_left, evaluation),
        ("checkpoint", saves_left, saving),
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
    """Seconds of a step to come: the stretches of the run so far, but for the two outermost.

    While there are too few steps to see the spread, the interval is as wide, in proportion, as that
    of the prediction.
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


def _spread(seconds: Sequence[float | None]) -> Interval | None:
    """The shortest, the middle and the longest of what was timed."""
    timed = [s for s in seconds if s is not None]
    return Interval(min(timed), statistics.median(timed), max(timed)) if timed else None


def _predicted_evaluation(spec: RunSpec, prediction: Prediction) -> Interval | None:
    step, count = prediction.best("step_seconds"), evaluations(spec)
    if step is None or not count or "eval_s" not in prediction.ledger:
        return None
    return step.scaled(prediction.ledger["eval_s"] / count)


def _predicted_checkpoint(spec: RunSpec, prediction: Prediction) -> Interval | None:
    count = checkpoints(spec)
    if not count or "checkpoint_s" not in prediction.ledger:
        return None
    return waiting_seconds(1.0, count).scaled(prediction.ledger["checkpoint_s"] / count)


def last_events(recorded: Recorded, measurements: Measurements) -> list[LastEvent]:
    """What a run that has not finished did last: one line of each kind, and the last events."""
    told: list[LastEvent] = []

    def tell(what: str, step: int | None, elapsed_seconds: float | None, text: str) -> None:
        text = text if len(text) <= LONGEST_EVENT_TEXT else text[:LONGEST_EVENT_TEXT] + " ..."
        told.append(LastEvent(what=what, step=step, elapsed_seconds=elapsed_seconds, text=text))

    for step in recorded.steps[-1:]:
        loss = "no finite loss" if step.loss is None else f"loss {step.loss:.4g}"
        took = "" if step.step_seconds is None else f", {format_seconds(step.step_seconds)}"
        tell("step", step.step, step.elapsed_seconds, loss + took)
    for evaluated in recorded.evals[-1:]:
        validation = evaluated.val_loss
        text = "no finite validation loss"
        if validation is not None:
            text = f"validation loss {validation:.4g}"
        tell("evaluation", evaluated.step, evaluated.elapsed_seconds, text)
    for saved in recorded.checkpoints[-1:]:
        again = measurements.steps_done - saved.step
        text = "no step was made since"
        if again > 0:
            text = f"{again:,} steps were made since; a resumed run makes them again"
        tell("checkpoint", saved.step, saved.elapsed_seconds, text)
    events = [e for e in recorded.events if e.what != "sample"]
    for event in events[-EVENTS_SHOWN:]:
        tell(event.what.replace("_", " "), event.step, event.elapsed_seconds, event.text)
    if recorded.end is not None:
        end = recorded.end
        tell(end.status, end.steps, end.elapsed_seconds, end.reason or "the log gives no reason")
    return told


def unfinished_headline(
    measurements: Measurements,
    spec: RunSpec,
    prediction: Prediction,
    quiet: Silence | None,
    projection: Projection | None,
    now: datetime,
) -> str:
    """Where the run stands, and when it ends, or would at this pace."""
    where = f"step {measurements.steps_done:,} of {spec.steps:,}"
    ran = measurements.ledger.ran_s
    if ran is not None and measurements.timed_whole:
        where += f" after {format_seconds(ran)}"
    if quiet is None:
        began = {"stopped": "Stopped", "failed": "Failed"}.get(measurements.status, "The log ends")
        text = f"{began} at {where}."
    elif quiet.state == "running":
        text = f"Running, {quiet.why}: {where}."
    else:
        word = {"died": "Died", "hung": "Hangs", "silent": "Silent"}[quiet.state]
        doubt = ", and perhaps dead" if quiet.state == "silent" and not quiet.certain else ""
        text = f"{word} at {where}{doubt}: {quiet.why}."
    if projection is None:
        return text
    total = _with_interval(projection)
    if quiet is None or quiet.state != "running":
        return f"{text} At the measured pace the whole run takes {total}."
    ahead = projection.left_s - quiet.last_line_age_s
    done = now + timedelta(seconds=ahead) if ahead <= FAR_SECONDS else None
    text += f" At this pace the whole run takes {total}, done {day_and_time(done, now)}"
    predicted = prediction.best("total_seconds")
    if predicted is None:
        return f"{text}."
    inside = predicted.contains(projection.total_s)
    interval = format_range("total_seconds", predicted.low, predicted.high)
    return f"{text}; {'inside' if inside else 'outside'} the predicted {interval}."


def _with_interval(projection: Projection) -> str:
    total, low, high = projection.total_s, projection.low_s, projection.high_s
    text = format_seconds(total)
    interval = format_range("total_seconds", low, high)
    if interval == text:
        interval = f"within {100 * max(total - low, high - total) / total:.2g} %"
    return f"{text} ({interval})"

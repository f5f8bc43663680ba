"""TODO docstring."""

from __future__ import annotations

import statistics

import numpy as np
import numpy.typing as npt

from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import Recorded
from nanogauge.schema import Stored


class Ledger(Stored):
    """Where the wall time went, in seconds; None where the log cannot tell a part from another."""

    compile_s: float | None
    step_s: float | None
    """without waiting for data"""
    eval_s: float | None
    checkpoint_s: float | None
    data_wait_s: float | None
    lost_s: float | None
    """work that a later process made again"""
    startup_s: float | None
    """of the processes after the first: until their first step began, without compilation and
    evaluation"""
    gap_s: float | None
    """between the processes, when none ran; None where the log does not tell"""
    other_s: float | None
    wall_s: float | None
    """from the first line to the last; without gap_s where that is not known. None where nothing in
    the log has a time"""

    @property
    def ran_s(self) -> float | None:
        """Of wall_s: the time in which a process ran."""
        return None if self.wall_s is None else self.wall_s - (self.gap_s or 0.0)


LEDGER_NAMES = {
    "step_s": "steps",
    "data_wait_s": "waiting for data",
    "eval_s": "evaluation",
    "checkpoint_s": "checkpoints",
    "compile_s": "compilation",
    "lost_s": "work made again",
    "startup_s": "starting again",
    "gap_s": "no process ran",
    "other_s": "everything else",
}
"""the parts of a ledger in words, in the order in which they are shown"""


def steady(recorded: Recorded) -> npt.NDArray[np.bool_]:
    """Which of the steps are steady: timed, and not the first of a process, which warms up.

    A step that waited for a compilation is none either, though that has a time of its own.
    """
    left_out = {start.first_step for start in recorded.starts}
    left_out |= {c.step for c in recorded.compiles if c.step is not None}
    timed = ~np.isnan(recorded.steps.column("step_seconds"))
    return timed & ~np.isin(recorded.steps.column("step"), list(left_out))


def steady_seconds(recorded: Recorded, first_step: int = 0) -> npt.NDArray[np.float64]:
    """The times of the steady steps from this one on."""
    wanted = steady(recorded) & (recorded.steps.column("step") >= first_step)
    return recorded.steps.column("step_seconds")[wanted]


def _ledger(recorded: Recorded, steps_done: int, median: float | None) -> Ledger:
    """Book every recorded second; steps and evaluations without a time of their own count median.

    What is left of the time of the processes is other_s. A log without a clock has no wall time of
    its own: its wall_s is the sum of the parts.
    """
    first_step = min((s.first_step for s in recorded.starts), default=0)
    timed = recorded.steps.known("step_seconds")
    waits = recorded.steps.known("data_wait_seconds")
    untimed = steps_done - first_step - len(timed)
    data_wait = float(waits.sum()) if len(waits) else None
    step = None
    if len(timed) or not untimed:
        step = float(timed.sum()) - (data_wait or 0.0) + untimed * (median or 0.0)
    known = [e.seconds for e in recorded.evals if e.seconds is not None]
    evaluation = None
    if known:
        unknown = len(recorded.evals) - len(known)
        evaluation = sum(known) + unknown * statistics.median(known)
    elif not recorded.evals:
        evaluation = 0.0
    saved = [c.seconds for c in recorded.checkpoints if c.seconds is not None]
    compiled = [c.seconds for c in recorded.compiles]
    # Our own log books whatever there was; in another's, no line may mean that it does not tell.
    nothing = 0.0 if recorded.starts[0].source == "train" else None
    checkpoint = sum(saved) if saved else nothing
    compile_s = sum(compiled) if compiled else nothing
    sessions = [s for s in recorded.session_seconds if s is not None]
    clocked = len(sessions) == len(recorded.session_seconds)
    lost = startup = None if len(recorded.starts) > 1 else 0.0  # a log without a clock
    if clocked:
        lost, startup = recorded.lost_seconds, _starting_again(recorded)
    parts = (step, evaluation, checkpoint, compile_s, data_wait, lost, startup)
    booked = sum(part for part in parts if part is not None)
    gaps = recorded.gap_seconds
    gap = None if None in gaps else sum(seconds for seconds in gaps if seconds is not None)
    return Ledger(
        compile_s=compile_s,
        step_s=step,
        eval_s=evaluation,
        checkpoint_s=checkpoint,
        data_wait_s=data_wait,
        lost_s=lost,
        startup_s=startup,
        gap_s=gap,
        other_s=sum(sessions) - booked if clocked else None,
        wall_s=sum(sessions) + (gap or 0.0) if clocked else (None if step is None else booked),
    )


def _time_it_ran(recorded: Recorded, ledger: Ledger) -> str:
    """How the total was measured, and what is not in it."""
    count = len(recorded.processes)
    if count == 1:
        return "wall time of the run"
    if ledger.gap_s is not None:
        between = f"the {format_seconds(ledger.gap_s)} between them, when none ran, are not in it"
    else:
        between = (
            "the time between them is not in it, and not known: the log names no time of day, or "
            "the clock that tells it was set"
        )
    return f"wall time of the run's {count} processes; {between}"


def _starting_again(recorded: Recorded) -> float:
    """Seconds of the later processes before their first step; all of one that made none."""
    total = 0.0
    for startup, session in zip(recorded.startups[1:], recorded.session_seconds[1:], strict=True):
        until = session if startup.first_step_began is None else startup.first_step_began
        total += max((until or 0.0) - startup.booked_seconds, 0.0)
    return total

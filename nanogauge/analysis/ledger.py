"""Split the wall time of a run into steps, evaluation, checkpoints, compilation, restarts, gaps."""

import statistics

import numpy as np
import numpy.typing as npt

from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Stored


class Measured(Stored):
    """A measured value, its spread and how it was obtained."""

    value: float
    p10: float | None = None
    p90: float | None = None
    n: int | None = None
    how: str
    predicted_part: float | None = None
    """Part of the value that predictions are about; None: all of it."""

    @property
    def predictable(self) -> float:
        """The value, or the part of it that predictions are about."""
        return self.value if self.predicted_part is None else self.predicted_part


class Ledger(Stored):
    """Wall time in seconds by activity; a part is None if the log does not separate it."""

    compile_s: float | None
    step_s: float | None
    """Training steps, without waiting for data."""
    eval_s: float | None
    checkpoint_s: float | None
    data_wait_s: float | None
    lost_s: float | None
    """Work lost in a crash or rollback and done again later."""
    startup_s: float | None
    """Time of resumed processes before their first step, without compilation and evaluation."""
    gap_s: float | None
    """Time between processes, while none ran; None if the log has no usable time of day."""
    asleep_s: float | None = None
    """Time in which a process stood still: stopped or paused, or the machine slept."""
    other_s: float | None
    wall_s: float | None
    """Time of all processes, while the machine slept, and, if known, gap_s; None without times."""

    @property
    def ran_s(self) -> float | None:
        """Total time during which a process of the run was alive and awake."""
        if self.wall_s is None:
            return None
        return self.wall_s - (self.gap_s or 0.0) - (self.asleep_s or 0.0)


LEDGER_NAMES = {
    "step_s": "steps",
    "data_wait_s": "waiting for data",
    "eval_s": "evaluation",
    "checkpoint_s": "checkpoints",
    "compile_s": "compilation",
    "lost_s": "repeated work",
    "startup_s": "restarting",
    "gap_s": "no process ran",
    "asleep_s": "asleep",
    "other_s": "everything else",
}
"""Ledger parts in display order, with their labels."""


def steady_steps(recorded: RunHistory) -> npt.NDArray[np.bool_]:
    """Return a mask of the steady steps.

    Steady steps are timed, are not the first of a process, and did not wait for a compilation.
    """
    excluded = {start.first_step for start in recorded.starts}
    excluded |= {c.step for c in recorded.compiles if c.step is not None}
    timed = ~np.isnan(recorded.steps.column("step_seconds"))
    return timed & ~np.isin(recorded.steps.column("step"), list(excluded))


def steady_seconds(recorded: RunHistory, first_step: int = 0) -> npt.NDArray[np.float64]:
    """Return the durations of the steady steps from `first_step` on."""
    selected = steady_steps(recorded) & (recorded.steps.column("step") >= first_step)
    return recorded.steps.column("step_seconds")[selected]


def build_ledger(recorded: RunHistory, steps_done: int, median: float | None) -> Ledger:
    """Split the recorded time by activity; untimed steps and evaluations count as the median.

    The unassigned rest of the processes' time is other_s. Without a clock, wall_s is the sum of the parts.
    """
    first_step = min((s.first_step for s in recorded.starts), default=0)
    timed = recorded.steps.known("step_seconds")
    waits = recorded.steps.known("data_wait_seconds")
    untimed = steps_done - first_step - len(timed)
    data_wait = float(waits.sum()) if len(waits) else None
    step = None
    if len(timed) or not untimed:
        step = float(timed.sum()) - (data_wait or 0.0) + untimed * (median or 0.0)
    evals = [e.seconds for e in recorded.evals if e.seconds is not None]
    evaluation = None
    if evals:
        evaluation = sum(evals) + (len(recorded.evals) - len(evals)) * statistics.median(evals)
    elif not recorded.evals:
        evaluation = 0.0
    saved = [c.seconds for c in recorded.checkpoints if c.seconds is not None]
    compiled = [c.seconds for c in recorded.compiles]
    # train.py logs every checkpoint and compilation; other programs may not.
    unlogged = 0.0 if recorded.starts[0].logs_all else None
    checkpoint = sum(saved) if saved else unlogged
    compile_s = sum(compiled) if compiled else unlogged
    sessions = [s for s in recorded.session_seconds if s is not None]
    clocked = len(sessions) == len(recorded.session_seconds)
    lost = startup = None if len(recorded.starts) > 1 else 0.0
    if clocked:
        lost, startup = recorded.lost_seconds, _restart_seconds(recorded)
    asleep = {what: sum(e.seconds or 0.0 for e in recorded.events if e.what == what) for what in ("suspended", "slept")}
    parts = (step, evaluation, checkpoint, compile_s, data_wait, lost, startup, asleep["suspended"])
    assigned = sum(part for part in parts if part is not None)
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
        asleep_s=sum(asleep.values()) if unlogged is not None else None,
        other_s=sum(sessions) - assigned if clocked else None,
        wall_s=sum(sessions) + (gap or 0.0) + asleep["slept"] if clocked else (None if step is None else assigned),
    )


def describe_run_time(recorded: RunHistory, ledger: Ledger) -> str:
    """Return a text on how the total was measured and what it excludes."""
    count = len(recorded.processes)
    asleep = f"; excludes {format_seconds(ledger.asleep_s)} asleep" if ledger.asleep_s else ""
    if count == 1:
        return f"wall time of the run{asleep}"
    if ledger.gap_s is not None:
        gap = f"excludes the {format_seconds(ledger.gap_s)} between them, when none ran"
    else:
        gap = (
            "excludes the time between them, which is not known: the log has no time of day, or "
            "the machine's clock was changed"
        )
    return f"wall time of the run's {count} processes; {gap}{asleep}"


def _restart_seconds(recorded: RunHistory) -> float:
    """Return the time of resumed processes before their first step; all if they made none."""
    total = 0.0
    for startup, session in zip(recorded.startups[1:], recorded.session_seconds[1:], strict=True):
        until = session if startup.first_step_began is None else startup.first_step_began
        total += max((until or 0.0) - startup.booked_seconds, 0.0)
    return total

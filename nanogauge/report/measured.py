"""What a run log says of each quantity: a figure with how it was measured, or why there is none."""

from __future__ import annotations

import statistics

import numpy as np
import numpy.typing as npt

from nanogauge.predict.flops import MFU_CONVENTIONS, flops_per_token_6n, flops_per_token_palm
from nanogauge.quantities import QUANTITIES, format_seconds, mfu
from nanogauge.records import Prediction, Stored
from nanogauge.report.figures import Measured, quantile
from nanogauge.report.quality import quality_figures, quality_notes
from nanogauge.report.sensed import energy_figures, memory_figures
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec

SPEEDUP_AFTER_SECONDS = 600
SPEEDUP_WINDOW_SECONDS = 60
NOT_IN_LOG = "not_in_log"
"""what an event is called that says why an imported log has no figure for the row it is about"""


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


class Measurements(Stored):
    values: dict[str, Measured]
    missing: dict[str, str]
    """row id -> why it was not measured"""
    refused: list[str]
    """row ids whose figure cannot be true; missing says why"""
    ledger: Ledger
    median_step_seconds: float | None
    steps_done: int
    timed_whole: bool
    """an imported log's ledger may lack evaluations, or how the run began"""
    status: str
    """finished, stopped, failed, or unfinished: it died or is still running"""
    notes: dict[str, list[str]]
    """row id -> what the log's events say about it"""


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


def measure(recorded: Recorded, spec: RunSpec, prediction: Prediction) -> Measurements:
    """Every quantity of a run, from its log."""
    steps = recorded.steps
    end = recorded.end
    steps_done = end.steps if end is not None else (steps[-1].step + 1 if steps else 0)
    status = end.status if end is not None else "unfinished"
    seconds = steady_seconds(recorded)
    median = float(np.median(seconds)) if len(seconds) else None
    ledger = _ledger(recorded, steps_done, median)
    values: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    refused: list[str] = []

    unique = recorded.starts[-1].train_tokens or spec.unique_tokens
    _count(values, missing, spec, prediction, steps_done, unique)
    if median is None:
        for row in ("step_seconds", "mfu_palm", "mfu_6n"):
            missing[row] = "no steady step is in the log yet"
    else:
        values["step_seconds"] = Measured(
            value=median,
            p10=quantile(seconds, 0.1),
            p90=quantile(seconds, 0.9),
            n=len(seconds),
            how=f"median of {len(seconds):,} steps without compilation, evaluation or checkpoint",
        )
        refused = _utilisation(values, missing, spec, prediction, median)
    _first_step(values, missing, recorded, median)
    _total(values, missing, recorded, spec, status, steps_done, ledger)
    for found, absent in (
        memory_figures(recorded, prediction),
        energy_figures(recorded, spec, prediction, ledger.ran_s),
        quality_figures(recorded.benchmarks),
    ):
        values |= found
        missing |= absent
    _speedup(values, missing, recorded)
    if not recorded.evals:
        missing["val_loss"] = "no evaluation is in the log yet"
    elif (last := recorded.evals[-1]).val_bits_per_byte is not None:
        bits = f"{last.val_bits_per_byte:.4f} bits per byte after {last.step:,} steps"
        missing["val_loss"] = f"not in this log: it has {bits}, and not the bytes per token"
    elif last.val_loss is None:
        missing["val_loss"] = f"it was not finite after {last.step:,} steps"
    else:
        how = f"evaluation after {last.step:,} steps"
        values["val_loss"] = Measured(value=last.val_loss, how=how)
    notes = quality_notes(recorded.benchmarks)
    timed_whole = ledger.other_s is not None or ledger.eval_s is not None
    for event in recorded.events:
        if event.about is not None and event.what == NOT_IN_LOG:
            values.pop(event.about, None)
            missing[event.about] = event.text
            timed_whole &= event.about != "total_seconds"
        elif event.about is not None:
            notes.setdefault(event.about, []).append(event.text)
    return Measurements(
        values={row: values[row] for row in QUANTITIES if row in values},
        missing=missing,
        refused=refused,
        ledger=ledger,
        median_step_seconds=median,
        steps_done=steps_done,
        timed_whole=timed_whole,
        status=status,
        notes=notes,
    )


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


def _total(
    values: dict[str, Measured],
    missing: dict[str, str],
    recorded: Recorded,
    spec: RunSpec,
    status: str,
    steps_done: int,
    ledger: Ledger,
) -> None:
    if status != "finished":
        missing["total_seconds"] = f"the run is at step {steps_done:,} of {spec.steps:,}"
    elif ledger.eval_s is None and ledger.other_s is None:
        missing["total_seconds"] = "no evaluation has a time of its own in this log"
    elif ledger.wall_s is not None:
        sampled = len(recorded.steps.known("step_seconds"))
        how = (
            _time_it_ran(recorded, ledger)
            if ledger.other_s is not None
            else f"reconstructed: {steps_done:,} steps from {sampled} printed ones, each "
            f"evaluation{', and compilation' if recorded.compiles else ''}"
        )
        assert ledger.ran_s is not None
        values["total_seconds"] = Measured(value=ledger.ran_s, how=how)
    else:
        missing["total_seconds"] = "no steady step is in this log to count the others by"


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


def _count(
    values: dict[str, Measured],
    missing: dict[str, str],
    spec: RunSpec,
    prediction: Prediction,
    steps_done: int,
    unique_tokens: int | None,
) -> None:
    """What follows from the steps that were really made."""
    tokens = steps_done * spec.tokens_per_step
    how = f"counted: {steps_done:,} steps x {spec.tokens_per_step:,} tokens"
    values["tokens_per_step"] = Measured(
        value=spec.tokens_per_step, how="micro-batch x context x accumulation, as run"
    )
    values["tokens_total"] = Measured(value=tokens, how=how)
    if unique_tokens is not None:
        values["data_epochs"] = Measured(
            value=tokens / unique_tokens, how=f"{how} / {unique_tokens:,} unique tokens"
        )
    else:
        missing["data_epochs"] = "the number of unique tokens is not known"
    for row in ("parameters", "parameters_total", "weights_bytes"):
        values[row] = Measured(
            value=prediction.quantities[row].expected, how="counted from the configuration"
        )
    for row, per_token in (
        ("flops_total_6n", flops_per_token_6n(spec.shape)),
        ("flops_total_palm", flops_per_token_palm(spec.shape)),
    ):
        values[row] = Measured(
            value=per_token * tokens, how=f"{how} x {per_token / 1e6:.1f} MFLOP per token"
        )


def _utilisation(
    values: dict[str, Measured],
    missing: dict[str, str],
    spec: RunSpec,
    prediction: Prediction,
    median: float,
) -> list[str]:
    """The shares of the peak; those above it are refused, and returned."""
    refused = []
    peak = prediction.peak_flops
    for row, per_token in MFU_CONVENTIONS.items():
        flops = per_token(spec.shape) * spec.tokens_per_step
        achieved = f"{flops / median / 1e12:.3g}"
        if peak is None:
            missing[row] = f"{achieved} TFLOP/s, but the peak is {prediction.hardware.peak_name}"
        elif (share := mfu(flops, median, peak)) > 1:
            missing[row] = (
                f"{achieved} TFLOP/s is above the peak ({prediction.hardware.peak_name}): the "
                "time, the FLOPs or the peak is wrong, so it is refused"
            )
            refused.append(row)
        else:
            values[row] = Measured(
                value=share,
                how=f"{achieved} of {peak / 1e12:.3g} TFLOP/s at the median step; "
                f"peak: {prediction.hardware.peak_name}",
            )
    return refused


def _first_step(
    values: dict[str, Measured], missing: dict[str, str], recorded: Recorded, median: float | None
) -> None:
    row = "first_step_seconds"
    begins = recorded.steps[:1]
    first = begins[0] if begins and begins[0].step == 0 else None
    compiling = sum(c.seconds for c in recorded.compiles[:1])
    if first is None:
        missing[row] = "step 0 is not in the log"
    elif first.step_seconds is not None:
        how = f"compilation {compiling:.3g} s + step {first.step_seconds:.3g} s"
        if not recorded.compiles:
            how = "the step alone: the log has no compilation"
        values[row] = Measured(value=compiling + first.step_seconds, how=how)
    elif first.printed_seconds is None:
        missing[row] = "the log has no time for step 0"
    elif median is None or not recorded.compiles:
        how = "as printed; what of it is evaluation, the step and compilation, no log line tells"
        values[row] = Measured(value=first.printed_seconds, how=how)
    else:
        inside = first.printed_seconds - compiling - median
        evaluating = f"an evaluation of about {inside:.3g} s, " if inside > 1e-6 else ""
        how = (
            f"as printed; of it {evaluating}a step of {median:.3g} s and {compiling:.3g} s that "
            "are left for compilation"
        )
        values[row] = Measured(value=first.printed_seconds, how=how)


def _speedup(values: dict[str, Measured], missing: dict[str, str], recorded: Recorded) -> None:
    """Steady speed after ten minutes over the speed in the first minute after the first step."""
    row = "speedup_after_warmup"
    wanted = steady(recorded) & ~np.isnan(recorded.steps.column("elapsed_seconds"))
    ends = recorded.steps.column("elapsed_seconds")[wanted]
    seconds = recorded.steps.column("step_seconds")[wanted]
    if not len(ends):
        numbers = [s.step for s in recorded.steps[:2]]
        between = f" between steps {numbers[0]} and {numbers[1]}" if len(numbers) > 1 else ""
        missing[row] = f"the log has no sample{between}, where a change of speed would show"
        return
    begin = ends[0] - seconds[0]
    early = seconds[ends <= begin + SPEEDUP_WINDOW_SECONDS]
    late = seconds[ends > begin + SPEEDUP_AFTER_SECONDS]
    if not len(late):
        missing[row] = "the run was shorter than 10 minutes"
    elif not len(early):
        missing[row] = "no step ended within the first minute"
    else:
        values[row] = Measured(
            value=float(np.median(early) / np.median(late)),
            n=len(early),
            how=f"median of {len(early)} steps in the first minute over that after 10 minutes",
        )

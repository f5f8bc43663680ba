"""What a run log says of each quantity: a figure with how it was measured, or why there is none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nanogauge.config import Config
from nanogauge.predict.energy import cost_formula, cost_of
from nanogauge.predict.flops import flops_per_token_6n, flops_per_token_palm
from nanogauge.predict.workload import shape_of
from nanogauge.quantities import QUANTITIES, mfu
from nanogauge.records import Prediction, Sensor, Step, Stored
from nanogauge.runlog import Recorded

SPEEDUP_AFTER_SECONDS = 600
SPEEDUP_WINDOW_SECONDS = 60
NOT_IN_LOG = "not_in_log"
"""what an event is called that says why an imported log has no figure for the row it is about"""


class Measured(Stored):
    value: float
    p10: float | None = None
    p90: float | None = None
    n: int | None = None
    how: str


class Ledger(Stored):
    """Where the wall time went, in seconds; None where the log cannot tell a part from another."""

    compile_s: float | None
    step_s: float | None
    """without waiting for data"""
    eval_s: float | None
    checkpoint_s: float | None
    data_wait_s: float | None
    other_s: float | None
    wall_s: float | None
    """None where nothing in the log has a time"""


LEDGER_NAMES = {
    "step_s": "steps",
    "data_wait_s": "waiting for data",
    "eval_s": "evaluation",
    "checkpoint_s": "checkpoints",
    "compile_s": "compilation",
    "other_s": "everything else",
}
"""the parts of a ledger in words, in the order in which they are shown"""


class Measurements(Stored):
    values: dict[str, Measured]
    missing: dict[str, str]
    """row id -> why it was not measured"""
    ledger: Ledger
    median_step_seconds: float | None
    steps_done: int
    timed_whole: bool
    """an imported log's ledger may lack evaluations, or how the run began"""
    status: str
    """finished, stopped, failed, or unfinished: it died or is still running"""
    notes: dict[str, list[str]]
    """row id -> what the log's events say about it"""


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, by linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def steady_steps(recorded: Recorded) -> list[Step]:
    """Timed steps but for the first of each process, which still allocates and warms up."""
    first = {start.first_step for start in recorded.starts}
    return [s for s in recorded.steps if s.step_seconds is not None and s.step not in first]


def measure(recorded: Recorded, config: Config, prediction: Prediction) -> Measurements:
    """Every quantity of a run, from its log."""
    steps = recorded.steps
    end = recorded.end
    steps_done = end.steps if end is not None else (steps[-1].step + 1 if steps else 0)
    status = end.status if end is not None else "unfinished"
    steady = [s.step_seconds for s in steady_steps(recorded) if s.step_seconds is not None]
    median = statistics.median(steady) if steady else None
    ledger = _ledger(recorded, steps_done, median)
    values: dict[str, Measured] = {}
    missing: dict[str, str] = {}

    unique = recorded.starts[-1].train_tokens or config.data.tokens
    _count(values, missing, config, prediction, steps_done, unique)
    if median is None:
        for row in ("step_seconds", "mfu_palm", "mfu_6n"):
            missing[row] = "no steady step is in the log yet"
    else:
        values["step_seconds"] = Measured(
            value=median,
            p10=quantile(steady, 0.1),
            p90=quantile(steady, 0.9),
            n=len(steady),
            how=f"median of {len(steady):,} steps without compilation, evaluation or checkpoint",
        )
        _utilisation(values, missing, config, prediction, median)
    _first_step(values, missing, recorded, median)
    if status != "finished":
        missing["total_seconds"] = (
            f"the run is at step {steps_done:,} of {config.train.max_steps:,}"
        )
    elif ledger.eval_s is None and ledger.other_s is None:
        missing["total_seconds"] = "no evaluation has a time of its own in this log"
    elif ledger.wall_s is not None:
        sampled = sum(s.step_seconds is not None for s in steps)
        how = (
            "wall time of the run"
            if ledger.other_s is not None
            else f"reconstructed: {steps_done:,} steps from {sampled} printed ones, each "
            f"evaluation, and compilation"
        )
        values["total_seconds"] = Measured(value=ledger.wall_s, how=how)
    _memory(values, missing, recorded, prediction)
    _energy(values, missing, recorded, config, prediction, ledger)
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
    missing["quality_vs_gpt2"] = "no benchmark was run"
    notes: dict[str, list[str]] = {}
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
        ledger=ledger,
        median_step_seconds=median,
        steps_done=steps_done,
        timed_whole=timed_whole,
        status=status,
        notes=notes,
    )


def _ledger(recorded: Recorded, steps_done: int, median: float | None) -> Ledger:
    """Book every recorded second; steps and evaluations without a time of their own count median.

    What is left of the wall time is other_s. A log without a clock has no wall time of its own: its
    wall_s is the sum of the parts.
    """
    first_step = min((s.first_step for s in recorded.starts), default=0)
    timed = [s.step_seconds for s in recorded.steps if s.step_seconds is not None]
    waits = [s.data_wait_seconds for s in recorded.steps if s.data_wait_seconds is not None]
    untimed = steps_done - first_step - len(timed)
    data_wait = sum(waits) if waits else None
    step = None
    if timed or not untimed:
        step = sum(timed) - (data_wait or 0.0) + untimed * (median or 0.0)
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
    parts = (step, evaluation, checkpoint, compile_s, data_wait)
    booked = sum(part for part in parts if part is not None)
    sessions = [s for s in recorded.session_seconds if s is not None]
    clocked = len(sessions) == len(recorded.session_seconds)
    return Ledger(
        compile_s=compile_s,
        step_s=step,
        eval_s=evaluation,
        checkpoint_s=checkpoint,
        data_wait_s=data_wait,
        other_s=sum(sessions) - booked if clocked else None,
        wall_s=sum(sessions) if clocked else (None if step is None else booked),
    )


def _count(
    values: dict[str, Measured],
    missing: dict[str, str],
    config: Config,
    prediction: Prediction,
    steps_done: int,
    unique_tokens: int | None,
) -> None:
    """What follows from the steps that were really made."""
    tokens = steps_done * config.tokens_per_step
    how = f"counted: {steps_done:,} steps x {config.tokens_per_step:,} tokens"
    values["tokens_per_step"] = Measured(
        value=config.tokens_per_step, how="micro-batch x context x accumulation, as run"
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
        ("flops_total_6n", flops_per_token_6n(shape_of(config.model))),
        ("flops_total_palm", flops_per_token_palm(shape_of(config.model))),
    ):
        values[row] = Measured(
            value=per_token * tokens, how=f"{how} x {per_token / 1e6:.1f} MFLOP per token"
        )


def _utilisation(
    values: dict[str, Measured],
    missing: dict[str, str],
    config: Config,
    prediction: Prediction,
    median: float,
) -> None:
    peak = prediction.peak_flops
    for row, per_token in (
        ("mfu_palm", flops_per_token_palm(shape_of(config.model))),
        ("mfu_6n", flops_per_token_6n(shape_of(config.model))),
    ):
        flops = per_token * config.tokens_per_step
        achieved = f"{flops / median / 1e12:.3g}"
        if peak is None:
            missing[row] = f"{achieved} TFLOP/s, but the peak is {prediction.hardware.peak_name}"
        elif mfu(flops, median, peak) > 1:
            missing[row] = (
                f"{achieved} TFLOP/s is above the peak ({prediction.hardware.peak_name}): refused"
            )
        else:
            values[row] = Measured(
                value=mfu(flops, median, peak),
                how=f"{achieved} of {peak / 1e12:.3g} TFLOP/s at the median step; "
                f"peak: {prediction.hardware.peak_name}",
            )


def _first_step(
    values: dict[str, Measured], missing: dict[str, str], recorded: Recorded, median: float | None
) -> None:
    row = "first_step_seconds"
    first = next((s for s in recorded.steps if s.step == 0), None)
    compiling = sum(c.seconds for c in recorded.compiles[:1])
    if first is None:
        missing[row] = "step 0 is not in the log"
    elif first.step_seconds is not None:
        how = f"compilation {compiling:.3g} s + step {first.step_seconds:.3g} s"
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


def _memory(
    values: dict[str, Measured],
    missing: dict[str, str],
    recorded: Recorded,
    prediction: Prediction,
) -> None:
    on_cpu = prediction.hardware.kind == "cpu"
    imported = recorded.starts[0].source != "train"
    ways = {
        "peak_allocated_bytes": "torch's allocator, at its highest",
        "peak_process_bytes": "resident memory of the process, at its highest"
        if on_cpu
        else "this process's memory on the card as the driver sees it, at its highest sample",
    }
    for row, how in ways.items():
        peaks = [getattr(end, row) for end in recorded.ends]
        seen = [p for p in peaks if p is not None]
        if row == "peak_process_bytes" and not on_cpu:
            seen += [s.process_used_bytes for s in recorded.sensors if s.process_used_bytes]
        if seen:
            values[row] = Measured(value=max(seen), how=how)
        elif on_cpu and row == "peak_allocated_bytes":
            missing[row] = "no GPU"
        elif imported:
            missing[row] = "not in this log"
        else:
            missing[row] = "the run has no end line yet" if recorded.end is None else "not reported"


def _energy(
    values: dict[str, Measured],
    missing: dict[str, str],
    recorded: Recorded,
    config: Config,
    prediction: Prediction,
    ledger: Ledger,
) -> None:
    rows = ("power_watts", "energy_kwh", "cost")
    if prediction.hardware.kind == "cpu":
        missing.update(dict.fromkeys(rows, "no GPU"))
        return
    trained_here = recorded.starts[0].source == "train"
    if not trained_here and not recorded.sensors:
        missing.update(dict.fromkeys(rows, "not in this log"))
        return
    absent = next((e.text for e in recorded.events if e.what == "no_power"), "no sensor readings")
    missing.update(dict.fromkeys(rows, absent))
    watts = [s.power_watts for s in recorded.sensors if s.power_watts is not None]
    if watts:
        values["power_watts"] = Measured(
            value=statistics.fmean(watts),
            p10=quantile(watts, 0.1),
            p90=quantile(watts, 0.9),
            n=len(watts),
            how="mean of the board's power as the driver reports it, "
            + ("one reading a second" if trained_here else "at the steps that are in the log"),
        )
    joules, source = _energy_of_sessions(recorded.sensors)
    if source is not None:
        kwh = joules / 3.6e6
        values["energy_kwh"] = Measured(value=kwh, how=f"{source}; the board alone")
        if config.cost.price_per_kwh is None:
            missing["cost"] = "cost.price_per_kwh is not given"
        else:
            paid = cost_of(config.cost, kwh, ledger.wall_s or 0.0)
            values["cost"] = Measured(value=paid, how=cost_formula(config.cost))


def _energy_of_sessions(sensors: list[Sensor]) -> tuple[float, str | None]:
    """Joules over all processes: each one's count starts at zero again."""
    total, last, source = 0.0, 0.0, None
    names = {"counter": "the driver's energy counter", "integral": "power integrated over time"}
    for sensor in sensors:
        if sensor.energy_joules is None or sensor.energy_source is None:
            continue
        if sensor.energy_joules < last:
            total += last
        last, source = sensor.energy_joules, names[sensor.energy_source]
    return total + last, source


def _speedup(values: dict[str, Measured], missing: dict[str, str], recorded: Recorded) -> None:
    """Steady speed after ten minutes over the speed in the first minute after the first step."""
    row = "speedup_after_warmup"
    clocked = [
        (s.elapsed_seconds, s.step_seconds)
        for s in steady_steps(recorded)
        if s.elapsed_seconds is not None and s.step_seconds is not None
    ]
    if not clocked:
        numbers = [s.step for s in recorded.steps]
        between = f" between steps {numbers[0]} and {numbers[1]}" if len(numbers) > 1 else ""
        missing[row] = f"the log has no sample{between}, where a change of speed would show"
        return
    begin = clocked[0][0] - clocked[0][1]
    early = [s for t, s in clocked if t <= begin + SPEEDUP_WINDOW_SECONDS]
    late = [s for t, s in clocked if t > begin + SPEEDUP_AFTER_SECONDS]
    if not late:
        missing[row] = "the run was shorter than 10 minutes"
    elif not early:
        missing[row] = "no step ended within the first minute"
    else:
        values[row] = Measured(
            value=statistics.median(early) / statistics.median(late),
            n=len(early),
            how=f"median of {len(early)} steps in the first minute over that after 10 minutes",
        )

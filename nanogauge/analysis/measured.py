"""What a run log says of each quantity: a figure with how it was measured, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nanogauge.analysis.figures import Measured, quantile
from nanogauge.analysis.ledger import Ledger, _ledger, _time_it_ran, steady, steady_seconds
from nanogauge.analysis.telemetry import energy_figures, memory_figures
from nanogauge.prediction.flops import MFU_CONVENTIONS, flops_per_token_6n, flops_per_token_palm
from nanogauge.quantities import QUANTITIES, mfu
from nanogauge.runlog.history import Recorded
from nanogauge.runspec import RunSpec
from nanogauge.schema import Benchmark, Prediction, Stored

ROW = "quality_vs_gpt2"
GPT2 = "gpt2"
HELD_OUT = "held_out"


def quality_figures(benchmarks: Sequence[Benchmark]) -> tuple[dict[str, Measured], dict[str, str]]:
    """The score ratio to GPT-2 124M, above 1 where the run is better; else why there is none.

    It is the geometric mean over the tasks of score / GPT-2's score, of the main metric of each.
    Where no task was run, it is GPT-2's bits per byte over the run's own, on text of the kind that
    the run was trained on and GPT-2 was not.
    """
    against = _against_gpt2(benchmarks)
    if not against:
        others = sorted({b.against for b in benchmarks if b.against not in (None, GPT2)}, key=str)
        absent = "no benchmark was run"
        if others:
            absent = f"benchmarks were held against {', '.join(map(str, others))}, not GPT-2 124M"
        return {}, {ROW: absent}
    tasks = [b for b in against if b.name != HELD_OUT]
    counted = tasks or against
    ratios = [ratio for b in counted if (ratio := _ratio(b)) is not None]
    how = f"score over GPT-2 124M's: {', '.join(f'{b.name} ({b.metric})' for b in counted)}"
    if not tasks:
        how = f"GPT-2 124M's over the run's own {counted[0].metric} on the run's held-out text"
    elif len(tasks) > 1:
        how = f"geometric mean of the {how}"
    value = math.prod(ratios) ** (1 / len(ratios))
    only = counted[0].n if len(counted) == 1 else None
    return {ROW: Measured(value=value, n=only, how=how)}, {}


def quality_notes(benchmarks: Sequence[Benchmark]) -> dict[str, list[str]]:
    """A sentence on each benchmark that was held against GPT-2 124M, by row."""
    sentences = [sentence(b) for b in _against_gpt2(benchmarks)]
    return {ROW: sentences} if sentences else {}


def _against_gpt2(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    return [b for b in benchmarks if b.main and b.against == GPT2 and _ratio(b) is not None]


def sentence(line: Benchmark) -> str:
    """A benchmark in words: both values, and whether their difference is more than chance."""
    text = f"{line.name} {line.metric} {line.value:.4f}"
    if line.against_value is None:
        return text
    text += f" against {line.against_value:.4f} of {line.against} (n = {line.n:,}"
    if line.difference_low is not None and line.difference_high is not None:
        text += (
            f", 95 % of the difference: {line.difference_low:+.4f} to {line.difference_high:+.4f}"
        )
        if line.difference_low <= 0 <= line.difference_high:
            text += ", which may be chance"
    return text + f"; step {line.step:,})"


def _ratio(line: Benchmark) -> float | None:
    """How many times as good as the other; None without another, or beside nothing."""
    better, worse = line.value, line.against_value
    if worse is not None and line.better == "lower":
        better, worse = worse, better
    return better / worse if worse is not None and worse > 0 else None


SPEEDUP_AFTER_SECONDS = 600
SPEEDUP_WINDOW_SECONDS = 60
NOT_IN_LOG = "not_in_log"
"""what an event is called that says why an imported log has no figure for the row it is about"""


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

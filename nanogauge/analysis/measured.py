"""Measure every row of the report from the run log, or say why it cannot be measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nanogauge.analysis.ledger import (
    Ledger,
    Measured,
    build_ledger,
    describe_run_time,
    steady_seconds,
    steady_steps,
)
from nanogauge.analysis.telemetry import energy_figures, memory_figures
from nanogauge.prediction.flops import MFU_CONVENTIONS, flops_per_token_6n, flops_per_token_palm
from nanogauge.quantities import QUANTITIES, mfu
from nanogauge.runlog.history import Recorded
from nanogauge.runspec import RunSpec
from nanogauge.schema import Benchmark, Prediction, Stored

QUALITY = "quality_vs_gpt2"
GPT2 = "gpt2"
HELD_OUT = "held_out"
SPEEDUP_AFTER_SECONDS = 600
SPEEDUP_WINDOW_SECONDS = 60
NOT_IN_LOG = "not_in_log"
"""Name of the event that says why an imported log has no value for a row."""


class Measurements(Stored):
    values: dict[str, Measured]
    missing: dict[str, str]
    """Row id -> reason why it was not measured."""
    refused: list[str]
    """Row ids with an impossible value; `missing` has the reason."""
    ledger: Ledger
    median_step_seconds: float | None
    steps_done: int
    timed_whole: bool
    """Whether the ledger covers the whole run; that of an imported log may not."""
    status: str
    """finished, stopped or failed; unfinished if the run died or is still running."""
    notes: dict[str, list[str]]
    """Row id -> texts of logged events about it."""


def measure(recorded: Recorded, spec: RunSpec, prediction: Prediction) -> Measurements:
    """Measure every quantity of a run."""
    steps = recorded.steps
    end = recorded.end
    steps_done = end.steps if end is not None else (steps[-1].step + 1 if steps else 0)
    status = end.status if end is not None else "unfinished"
    seconds = steady_seconds(recorded)
    median = float(np.median(seconds)) if len(seconds) else None
    ledger = build_ledger(recorded, steps_done, median)
    values: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    refused: list[str] = []

    unique = recorded.starts[-1].train_tokens or spec.unique_tokens
    _measure_counts(values, missing, spec, prediction, steps_done, unique)
    if median is None:
        for row in ("step_seconds", "mfu_palm", "mfu_6n"):
            missing[row] = "no steady step is in the log yet"
    else:
        values["step_seconds"] = Measured(
            value=median,
            p10=float(np.quantile(seconds, 0.1)),
            p90=float(np.quantile(seconds, 0.9)),
            n=len(seconds),
            how=f"median of {len(seconds):,} steps without compilation, evaluation or checkpoint",
        )
        refused = _measure_mfu(values, missing, spec, prediction, median)
    _measure_first_step(values, missing, recorded, median)
    _measure_total(values, missing, recorded, spec, status, steps_done, ledger)
    for found, absent in (
        memory_figures(recorded, prediction),
        energy_figures(recorded, spec, prediction, ledger.ran_s),
        quality_figures(recorded.benchmarks),
    ):
        values |= found
        missing |= absent
    _measure_speedup(values, missing, recorded)
    _measure_val_loss(values, missing, recorded)
    notes: dict[str, list[str]] = {}
    if compared := _gpt2_benchmarks(recorded.benchmarks):
        notes[QUALITY] = [describe_benchmark(b) for b in compared]
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


def _measure_total(
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
    elif ledger.ran_s is not None:
        timed = len(recorded.steps.known("step_seconds"))
        how = (
            describe_run_time(recorded, ledger)
            if ledger.other_s is not None
            else f"reconstructed: {steps_done:,} steps from {timed} printed ones, each "
            f"evaluation{', and compilation' if recorded.compiles else ''}"
        )
        values["total_seconds"] = Measured(value=ledger.ran_s, how=how)
    else:
        missing["total_seconds"] = "no steady step in this log gives the time of the others"


def _measure_counts(
    values: dict[str, Measured],
    missing: dict[str, str],
    spec: RunSpec,
    prediction: Prediction,
    steps_done: int,
    unique_tokens: int | None,
) -> None:
    """Fill the rows that follow from the number of steps and the configuration."""
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


def _measure_mfu(
    values: dict[str, Measured],
    missing: dict[str, str],
    spec: RunSpec,
    prediction: Prediction,
    median: float,
) -> list[str]:
    """Fill the MFU rows; return those above 1, which are refused."""
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


def _measure_first_step(
    values: dict[str, Measured], missing: dict[str, str], recorded: Recorded, median: float | None
) -> None:
    row = "first_step_seconds"
    first = recorded.steps[0] if recorded.steps else None
    compiling = sum(c.seconds for c in recorded.compiles[:1])
    if first is None or first.step != 0:
        missing[row] = "step 0 is not in the log"
    elif first.step_seconds is not None:
        how = f"compilation {compiling:.3g} s + step {first.step_seconds:.3g} s"
        if not recorded.compiles:
            how = "the step alone: the log has no compilation"
        values[row] = Measured(value=compiling + first.step_seconds, how=how)
    elif first.printed_seconds is None:
        missing[row] = "the log has no time for step 0"
    elif median is None or not recorded.compiles:
        how = "as printed; the log does not separate evaluation, step and compilation"
        values[row] = Measured(value=first.printed_seconds, how=how)
    else:
        rest = first.printed_seconds - compiling - median
        evaluating = f"an evaluation of about {rest:.3g} s, " if rest > 1e-6 else ""
        how = (
            f"as printed; of it {evaluating}a step of {median:.3g} s and {compiling:.3g} s that "
            "are left for compilation"
        )
        values[row] = Measured(value=first.printed_seconds, how=how)


def _measure_speedup(
    values: dict[str, Measured], missing: dict[str, str], recorded: Recorded
) -> None:
    """Compare the step time after ten minutes with that of the first minute."""
    row = "speedup_after_warmup"
    timed = steady_steps(recorded) & ~np.isnan(recorded.steps.column("elapsed_seconds"))
    ends = recorded.steps.column("elapsed_seconds")[timed]
    seconds = recorded.steps.column("step_seconds")[timed]
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


def _measure_val_loss(
    values: dict[str, Measured], missing: dict[str, str], recorded: Recorded
) -> None:
    row = "val_loss"
    if not recorded.evals:
        missing[row] = "no evaluation is in the log yet"
        return
    last = recorded.evals[-1]
    if last.val_bits_per_byte is not None:
        bits = f"{last.val_bits_per_byte:.4f} bits per byte after {last.step:,} steps"
        missing[row] = f"not in this log: it has {bits}, and not the bytes per token"
    elif last.val_loss is None:
        missing[row] = f"non-finite after {last.step:,} steps"
    else:
        values[row] = Measured(value=last.val_loss, how=f"evaluation after {last.step:,} steps")


def quality_figures(benchmarks: Sequence[Benchmark]) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return the score ratio to GPT-2 124M (above 1: the run is better), or why there is none.

    The geometric mean over the tasks of score / GPT-2's score, of each task's main metric.
    Without tasks, GPT-2's bits per byte on the run's held-out text over those of the run.
    """
    compared = _gpt2_benchmarks(benchmarks)
    if not compared:
        others = sorted({b.against for b in benchmarks if b.against not in (None, GPT2)}, key=str)
        absent = "no benchmark was run"
        if others:
            absent = f"benchmarks were compared with {', '.join(map(str, others))}, not GPT-2 124M"
        return {}, {QUALITY: absent}
    tasks = [b for b in compared if b.name != HELD_OUT]
    counted = tasks or compared
    ratios = [ratio for b in counted if (ratio := _score_ratio(b)) is not None]
    how = f"score over GPT-2 124M's: {', '.join(f'{b.name} ({b.metric})' for b in counted)}"
    if not tasks:
        how = f"GPT-2 124M's over the run's own {counted[0].metric} on the run's held-out text"
    elif len(tasks) > 1:
        how = f"geometric mean of the {how}"
    value = math.prod(ratios) ** (1 / len(ratios))
    n = counted[0].n if len(counted) == 1 else None
    return {QUALITY: Measured(value=value, n=n, how=how)}, {}


def _gpt2_benchmarks(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    return [b for b in benchmarks if b.main and b.against == GPT2 and _score_ratio(b) is not None]


def describe_benchmark(line: Benchmark) -> str:
    """Format both scores and whether their difference may be chance."""
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


def _score_ratio(line: Benchmark) -> float | None:
    """Return how many times better the run scored; None without a positive score to compare."""
    better, worse = line.value, line.against_value
    if worse is not None and line.better == "lower":
        better, worse = worse, better
    return better / worse if worse is not None and worse > 0 else None

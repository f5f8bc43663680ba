"""Predictions held against runs that other people published: errors, coverage, interval width.

python bench/validate_predictions.py RUNS.csv [--json] [--markdown] [--keep-constants]

Prints every row with its prediction and error, every row that is skipped with its reason, and the
same errors with the constants refitted without the row's own source. The peer is the usual rule:
PaLM's FLOPs at one MFU for everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fitting import fit, fitted_to
from published_runs import PowerReading, PublishedRun, read_runs
from results import Bench, Result, result
from rich.console import Console
from rich.table import Table

from nanogauge.prediction.constants import FITTED, Constants
from nanogauge.prediction.energy import power_share
from nanogauge.prediction.flops import flops_per_token_palm
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.step_time import predict_step_time
from nanogauge.quantities import Interval

ONE_MFU = 0.39  # the median of the published runs: what the rule would be told
TRUSTED = ("high", "medium")
# Where a row leaves out how it was run, the interval is at least this wide.
INCOMPLETE = (0.80, 1.28)


@dataclass(frozen=True)
class Compared:
    """A figure that was published and the one that is predicted."""

    run: PublishedRun
    actual: float
    predicted: Interval

    @property
    def error(self) -> float:
        return self.predicted.expected / self.actual - 1

    @property
    def inside(self) -> bool:
        return self.predicted.contains(self.actual)


def step_times(runs: Sequence[PublishedRun], constants: Constants = FITTED) -> list[Compared]:
    """Seconds of a step, for the runs that have them and whose class of device is known."""
    compared = []
    for run in runs:
        step = predict_step_time(run.work, run.hardware, constants)
        if step is None or run.step_seconds is None:
            continue
        factor = step.factor
        if not run.complete:
            factor = Interval(min(factor.low, INCOMPLETE[0]), 1.0, max(factor.high, INCOMPLETE[1]))
        compared.append(Compared(run, run.step_seconds, factor * step.seconds))
    return compared


def peaks(runs: Sequence[PublishedRun]) -> list[Compared]:
    """Bytes at the peak: of tensors, the allocator or the process, whichever was published."""
    compared = []
    for run in runs:
        memory = predict_memory(run.work, run.hardware)
        if run.peak_allocated_bytes is not None:
            compared.append(Compared(run, run.peak_allocated_bytes, memory.allocated))
        elif run.peak_reserved_bytes is not None:
            compared.append(Compared(run, run.peak_reserved_bytes, memory.reserved))
        elif run.peak_process_bytes is not None:
            compared.append(Compared(run, run.peak_process_bytes, memory.process))
    return compared


def left_out(runs: Sequence[PublishedRun]) -> dict[str, Compared]:
    """Each run predicted with constants fitted to the runs of all other sources."""
    found: dict[str, Compared] = {}
    usable = fitted_to(runs)
    for source in sorted({run.source for run in usable}):
        constants = fit([run for run in usable if run.source != source], FITTED)
        of_source = [run for run in usable if run.source == source]
        found |= {c.run.id: c for c in step_times(of_source, constants)}
    return found


def one_mfu(compared: Compared) -> float:
    """Relative error of FLOPs / (peak x one MFU)."""
    run = compared.run
    assert run.hardware.peak_flops is not None
    flops = flops_per_token_palm(run.work.shape) * run.work.tokens_per_step / run.work.gpus
    return flops / (ONE_MFU * run.hardware.peak_flops) / compared.actual - 1


def measure(given: Any) -> list[Result]:
    runs, power, skipped = read_runs(given.runs)
    times, memory = step_times(runs), peaks(runs)
    without_class = [run for run in runs if predict_step_time(run.work, run.hardware) is None]
    refitted = {} if given.keep_constants else left_out(runs)
    main_set = [c for c in times if c.run.confidence in TRUSTED and c.run.work.dtype == "bfloat16"]
    predicted = {c.run.id for c in (*times, *memory)} | {reading.id for reading in power}
    reasons = {s.id: s.reason for s in skipped if s.id not in predicted}
    reasons |= {
        run.id: f"no constants for the class {run.hardware.architecture}"
        for run in without_class
        if run.id not in predicted
    }
    if given.markdown:
        print(_markdown("published, ms", "predicted, ms", 1e3, ",.1f", times, refitted))
        print(_markdown("published, GiB", "predicted, GiB", 2**-30, ".2f", memory, {}))
    elif not given.json:
        console = Console(width=150)
        seconds: Callable[[float], str] = lambda value: f"{1e3 * value:,.1f}"  # noqa: E731
        gib: Callable[[float], str] = lambda value: f"{value / 2**30:.2f}"  # noqa: E731
        title = "Step time, ms (* bf16, high or medium confidence)"
        _print(console, title, times, seconds, refitted)
        _print(console, "Peak memory, GiB", memory, gib, {})
        _print_power(console, power)
        for name, reason in reasons.items():
            console.print(f"skipped: {name}: {reason}", style="dim", highlight=False)
    return _results(main_set, refitted, memory, power, len(predicted), len(reasons))


def _results(
    main_set: list[Compared],
    refitted: dict[str, Compared],
    memory: list[Compared],
    power: list[PowerReading],
    predicted: int,
    skipped: int,
) -> list[Result]:
    case = "bf16, high or medium confidence"
    rule = f"6N + 12LCT at an MFU of {ONE_MFU}"

    def quantile(name: str, of: str, values: Sequence[float], share: float, peer: str) -> Result:
        value = float(np.quantile(values, share)) if values else None
        return result(name, of, values, peer, value)

    def mean(name: str, of: str, inside: Sequence[bool]) -> Result:
        value = statistics.fmean(inside) if inside else None
        return result(name, of, [float(each) for each in inside], "published", value)

    errors = [abs(c.error) for c in main_set]
    rule_errors = [abs(one_mfu(c)) for c in main_set]
    wide = [c.predicted.high / c.predicted.low for c in main_set]
    found = [
        quantile("step_time_median_error", case, errors, 0.5, "published"),
        quantile("step_time_p90_error", case, errors, 0.9, "published"),
        mean("step_time_coverage", case, [c.inside for c in main_set]),
        quantile("step_time_interval_width", case, wide, 0.5, "high / low"),
        quantile("one_mfu_median_error", case, rule_errors, 0.5, rule),
        quantile("one_mfu_p90_error", case, rule_errors, 0.9, rule),
    ]
    if refitted:
        out = f"{case}, its source left out"
        left = [refitted[c.run.id] for c in main_set if c.run.id in refitted]
        without = [abs(c.error) for c in left]
        found += [
            quantile("step_time_median_error_left_out", out, without, 0.5, "published"),
            quantile("step_time_p90_error_left_out", out, without, 0.9, "published"),
            mean("step_time_coverage_left_out", out, [c.inside for c in left]),
        ]
    of = "tensors, or the process where that was published"
    of_memory = [abs(c.error) for c in memory if c.run.confidence in TRUSTED]
    drawn = [power_share(reading.hardware).contains(reading.share) for reading in power]
    return [
        *found,
        quantile("memory_median_error", of, of_memory, 0.5, "published"),
        mean("memory_coverage", of, [c.inside for c in memory]),
        mean("power_coverage", "mean board power over its limit", drawn),
        result("rows_predicted", "all rows", [predicted], None),
        result("rows_skipped", "all rows", [skipped], None),
    ]


def _print(
    console: Console,
    title: str,
    compared: list[Compared],
    text: Callable[[float], str],
    refitted: dict[str, Compared],
) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "run",
        "card",
        "published",
        "predicted",
        "low - high",
        "error",
        "left out",
        "assumed",
    ):
        table.add_column(
            column, justify="left" if column in ("run", "card", "assumed") else "right"
        )
    for c in compared:
        trusted = c.run.confidence in TRUSTED and c.run.work.dtype == "bfloat16"
        other = refitted.get(c.run.id)
        table.add_row(
            ("* " if trusted else "  ") + c.run.id,
            c.run.hardware.name,
            text(c.actual),
            text(c.predicted.expected),
            f"{text(c.predicted.low)} - {text(c.predicted.high)}" + ("" if c.inside else " !"),
            f"{100 * c.error:+.1f} %",
            "" if other is None else f"{100 * other.error:+.1f} %",
            ", ".join(c.run.assumed),
        )
    console.print(table)


def _markdown(
    published: str,
    predicted: str,
    scale: float,
    form: str,
    compared: list[Compared],
    refitted: dict[str, Compared],
) -> str:
    """The table run by run, as docs/prediction.md has it."""
    lines = [
        f"| run | source | card | {published} | {predicted} | error | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in compared:
        other = refitted.get(c.run.id)
        cells = (
            c.run.id + (" (" + ", ".join(c.run.assumed) + " assumed)" if c.run.assumed else ""),
            c.run.source,
            c.run.hardware.name,
            f"{scale * c.actual:{form}}",
            f"{scale * c.predicted.expected:{form}}",
            f"{100 * c.error:+.1f} %" + ("" if c.inside else " outside"),
            "" if other is None else f"{100 * other.error:+.1f} %",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _print_power(console: Console, power: list[PowerReading]) -> None:
    table = Table(title="Mean board power, W", title_justify="left")
    for column in ("run", "card", "published", "limit", "share", "predicted share"):
        table.add_column(column)
    for reading in power:
        predicted, share = power_share(reading.hardware), reading.share
        table.add_row(
            reading.id,
            reading.hardware.name,
            f"{reading.watts:.1f}",
            f"{reading.limit_watts:g}",
            f"{share:.3f}" + ("" if predicted.contains(share) else " !"),
            f"{predicted.low:g} - {predicted.high:g}",
        )
    console.print(table)


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("runs", type=Path, help="CSV of published runs")
    bench.add_argument(
        "--markdown", action="store_true", help="print the tables of docs/prediction.md"
    )
    bench.add_argument(
        "--keep-constants", action="store_true", help="do not refit with sources left out"
    )
    bench.run(measure)

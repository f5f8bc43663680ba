"""Validate predictions against published runs: errors, coverage, interval width.

python bench/validate_predictions.py RUNS.csv [MORE.csv ...] [--json] [--markdown] [--keep-constants]

Prints every row with its prediction and error, every row that is skipped with its reason, and the same errors with the
constants refitted without the row's own source, and without its whole class of device. The peer is the usual rule:
PaLM's FLOPs at one MFU for everything.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fitting import fit, usable_runs
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

ONE_MFU = 0.39  # the median of the published runs
TRUSTED = ("high", "medium")
CASE = "bf16, high or medium confidence"
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
        of_tensors, of_allocator = (
            (run.peak_allocated_bytes, memory.allocated),
            (run.peak_reserved_bytes, memory.reserved),
        )
        pairs = (of_tensors, of_allocator, (run.peak_process_bytes, memory.process))
        compared += [Compared(run, actual, predicted) for actual, predicted in pairs if actual is not None][:1]
    return compared


def left_out(runs: Sequence[PublishedRun], group: Callable[[PublishedRun], str]) -> dict[str, Compared]:
    """Predict each run with constants fitted to the runs of all other groups."""
    found: dict[str, Compared] = {}
    usable = usable_runs(runs)
    for name in sorted({group(run) for run in usable}):
        others = [run for run in usable if group(run) != name]
        if not others:
            break
        constants = fit(others).constants
        of_group = [run for run in usable if group(run) == name]
        found |= {c.run.id: c for c in step_times(of_group, constants)}
    return found


def class_of(run: PublishedRun) -> str:
    """Return the class of the table by class: architecture and kind of board."""
    return f"{run.hardware.architecture}, {run.hardware.kind}"


def one_mfu(compared: Compared) -> float:
    """Relative error of FLOPs / (peak x one MFU)."""
    run = compared.run
    assert run.hardware.peak_flops is not None
    flops = flops_per_token_palm(run.work.shape) * run.work.tokens_per_step / run.work.gpus
    return flops / (ONE_MFU * run.hardware.peak_flops) / compared.actual - 1


def measure(given: Any) -> list[Result]:
    tables = [read_runs(path) for path in given.runs]
    runs = [run for table in tables for run in table[0]]
    power = [reading for table in tables for reading in table[1]]
    skipped = [row for table in tables for row in table[2]]
    times, memory = step_times(runs), peaks(runs)
    without_class = [run for run in runs if predict_step_time(run.work, run.hardware) is None]
    without: dict[str, dict[str, Compared]] = {}
    if not given.keep_constants:
        without = {
            "source": left_out(runs, lambda run: run.owner),
            "class": left_out(runs, lambda run: run.hardware.architecture),
        }
    counted = [c for c in times if _is_counted(c.run)]
    predicted = {c.run.id for c in (*times, *memory)} | {reading.id for reading in power}
    reasons = {s.id: s.reason for s in skipped if s.id not in predicted}
    reasons |= {
        run.id: f"no constants for the class {run.hardware.architecture}"
        for run in without_class
        if run.id not in predicted
    }
    by_class = _by_class(counted, without)
    if given.markdown:
        print(_markdown_table(BY_CLASS, by_class))
        print(_markdown("published, ms", "predicted, ms", 1e3, ",.1f", times, without))
        print(_markdown("published, GiB", "predicted, GiB", 2**-30, ".2f", memory, {}))
    elif not given.json:
        console = Console(width=150)
        seconds: Callable[[float], str] = lambda value: f"{1e3 * value:,.1f}"  # noqa: E731
        gib: Callable[[float], str] = lambda value: f"{value / 2**30:.2f}"  # noqa: E731
        _print(console, f"Step time, ms (* {CASE})", times, seconds, without)
        _print(console, "Peak memory, GiB", memory, gib, {})
        _print_power(console, power)
        table = Table(*BY_CLASS, title="Step time by class", title_justify="left")
        for row in by_class:
            table.add_row(*row)
        console.print(table)
        for name, reason in reasons.items():
            console.print(f"skipped: {name}: {reason}", style="dim", highlight=False)
    return [
        *_time_results(counted, without),
        *_other_results(counted, memory, power),
        result("rows_predicted", "all rows", [len(predicted)], None),
        result("rows_skipped", "all rows", [len(reasons)], None),
    ]


def _is_counted(run: PublishedRun) -> bool:
    return run.confidence in TRUSTED and run.work.dtype == "bfloat16"


def _quantile(name: str, of: str, values: Sequence[float], share: float, peer: str) -> Result:
    return result(name, of, values, peer, float(np.quantile(values, share)) if values else None)


def _mean(name: str, of: str, values: Sequence[float], peer: str = "published") -> Result:
    return result(name, of, values, peer, statistics.fmean(values) if values else None)


def _time_results(counted: list[Compared], without: dict[str, dict[str, Compared]]) -> list[Result]:
    """Return error, coverage and width of the intervals: with these constants, and left out."""
    cases = [("", CASE, counted)]
    for what, suffix in (("source", "_left_out"), ("class", "_class_left_out")):
        if what in without:
            of = [without[what][c.run.id] for c in counted if c.run.id in without[what]]
            cases.append((suffix, f"{CASE}, its {what} left out", of))
    results = []
    for suffix, case, compared in cases:
        errors = [abs(c.error) for c in compared]
        wide = [c.predicted.high / c.predicted.low for c in compared]
        results += [
            _quantile(f"step_time_median_error{suffix}", case, errors, 0.5, "published"),
            _quantile(f"step_time_p90_error{suffix}", case, errors, 0.9, "published"),
            _mean(f"step_time_coverage{suffix}", case, [float(c.inside) for c in compared]),
            _mean(f"step_time_interval_width{suffix}", case, wide, "high / low"),
        ]
    return results


def _other_results(counted: list[Compared], memory: list[Compared], power: list[PowerReading]) -> list[Result]:
    rule = f"6N + 12LCT at an MFU of {ONE_MFU}"
    errors = [abs(one_mfu(c)) for c in counted]
    of_memory = [abs(c.error) for c in memory if c.run.confidence in TRUSTED]
    within = [float(c.inside) for c in memory]
    drawn = [float(power_share(each.hardware).contains(each.share)) for each in power]
    of = "tensors, or the process where that was published"
    return [
        _quantile("one_mfu_median_error", CASE, errors, 0.5, rule),
        _quantile("one_mfu_p90_error", CASE, errors, 0.9, rule),
        _quantile("memory_median_error", of, of_memory, 0.5, "published"),
        _mean("memory_coverage", of, within),
        _mean("power_coverage", "mean board power over its limit", drawn),
    ]


BY_CLASS = (
    *("class", "runs", "sources", "signed median", "source left out", "class left out"),
    *("inside, source left out", "worst, source left out"),
)


def _by_class(counted: list[Compared], without: dict[str, dict[str, Compared]]) -> list[tuple[str, ...]]:
    """Return the table by class: signed median errors, coverage, the worst run by name."""
    rows = []
    for name in sorted({class_of(c.run) for c in counted}):
        here = [c for c in counted if class_of(c.run) == name]
        cells = [name, str(len(here)), str(len({c.run.owner for c in here})), _median(here)]
        for what in ("source", "class"):
            found = without.get(what, {})
            cells.append(_median([found[c.run.id] for c in here if c.run.id in found]))
        others = [without.get("source", {}).get(c.run.id, c) for c in here]
        worst = max(others, key=lambda c: abs(c.error))
        cells.append(f"{sum(c.inside for c in others)} of {len(others)}")
        cells.append(f"{worst.run.id} {100 * worst.error:+.0f} %")
        rows.append(tuple(cells))
    return rows


def _median(compared: list[Compared]) -> str:
    return f"{100 * statistics.median(c.error for c in compared):+.1f} %" if compared else ""


def _print(
    console: Console,
    title: str,
    compared: list[Compared],
    text: Callable[[float], str],
    without: dict[str, dict[str, Compared]],
) -> None:
    table = Table(title=title, title_justify="left")
    columns = ("run", "card", "published", "predicted", "low - high", "error", "source out", "class out", "assumed")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "card", "assumed") else "right")
    for c in compared:
        table.add_row(
            ("* " if _is_counted(c.run) else "  ") + c.run.id,
            c.run.hardware.name,
            text(c.actual),
            text(c.predicted.expected),
            f"{text(c.predicted.low)} - {text(c.predicted.high)}" + ("" if c.inside else " !"),
            f"{100 * c.error:+.1f} %",
            *_left_out_cells(c, without),
            ", ".join(c.run.assumed),
        )
    console.print(table)


def _left_out_cells(c: Compared, without: dict[str, dict[str, Compared]]) -> tuple[str, ...]:
    others = (without.get(what, {}).get(c.run.id) for what in ("source", "class"))
    return tuple("" if other is None else f"{100 * other.error:+.1f} %" for other in others)


def _markdown_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [" | ".join(cells) for cells in (columns, ("---",) * len(columns), *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _markdown(
    published: str,
    predicted: str,
    scale: float,
    form: str,
    compared: list[Compared],
    without: dict[str, dict[str, Compared]],
) -> str:
    """The table run by run, as docs/prediction.md has it."""
    columns = ("run", "source", "card", published, predicted, "error", "source out", "class out")
    rows = [
        (
            c.run.id + (" (" + ", ".join(c.run.assumed) + " assumed)" if c.run.assumed else ""),
            c.run.source.split(" (")[0],
            c.run.hardware.name,
            f"{scale * c.actual:{form}}",
            f"{scale * c.predicted.expected:{form}}",
            f"{100 * c.error:+.1f} %" + ("" if c.inside else " outside"),
            *_left_out_cells(c, without),
        )
        for c in compared
    ]
    return _markdown_table(columns, rows)


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
    bench.add_argument("runs", type=Path, nargs="+", help="CSV of published runs")
    bench.add_argument("--markdown", action="store_true", help="print the tables of docs/prediction.md")
    bench.add_argument("--keep-constants", action="store_true", help="do not refit with sources and classes left out")
    bench.run(measure)

"""How a run's model does beside GPT-2 124M, from the benchmarks in its log."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanogauge.analysis.figures import Measured
from nanogauge.schema import Benchmark

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

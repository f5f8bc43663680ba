"""Search for what fits: into memory (micro-batch, model), and into the time until a deadline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nanogauge.prediction.flops import count_parameters
from nanogauge.prediction.memory import Copied, Memory, predict_memory
from nanogauge.prediction.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec, with_shape
from nanogauge.schedule import checkpoints
from nanogauge.schema import Hardware, Prediction

Verdict = Literal["fits", "doubtful", "does not fit"]


def fit_verdict(peak: Interval, free_bytes: float) -> Verdict:
    """Return whether a predicted peak fits; doubtful if the free memory lies in its interval."""
    if peak.low > free_bytes:
        return "does not fit"
    return "fits" if peak.high <= free_bytes else "doubtful"


def memory_of(spec: RunSpec, hardware: Hardware) -> Memory:
    """Return the predicted peak memory on each device of the run."""
    copies = checkpoints(spec)
    copied: Copied = "in training" if copies > 1 else "at the end" if copies else "never"
    return predict_memory(workload_of(spec, hardware.kind != "cpu"), hardware, copied)


def is_expected_to_fit(spec: RunSpec, hardware: Hardware, free_bytes: float) -> bool:
    return memory_of(spec, hardware).process.expected <= free_bytes


def with_micro_batch(spec: RunSpec, micro: int) -> RunSpec:
    """Return the run at a micro-batch of `micro`, a divisor of the unchanged sequences per step."""
    sequences = spec.micro_batch * spec.grad_accum
    return replace(spec, micro_batch=micro, grad_accum=sequences // micro)


def largest_micro_batch(
    spec: RunSpec, hardware: Hardware, free: float, end: Literal["expected", "high"] = "expected"
) -> int | None:
    """Return the largest micro-batch at the same tokens per step whose peak fits into `free` bytes.

    `end` is the end of the peak's interval that must fit: "expected", or "high" to be sure. None
    if no micro-batch fits.
    """
    sequences = spec.micro_batch * spec.grad_accum // spec.world_size
    below_root = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    for micro in sorted({*below_root, *(sequences // d for d in below_root)}, reverse=True):
        peak = memory_of(with_micro_batch(spec, micro), hardware).process
        if (peak.expected if end == "expected" else peak.high) <= free:
            return micro
    return None


def largest_that(passes: Callable[[int], bool]) -> int:
    """Return the largest n >= 1 with passes(n), or 0. Binary search; `passes` must be monotonic."""
    beyond = 1
    while passes(beyond):
        beyond *= 2
    below = beyond // 2
    while beyond - below > 1:
        middle = (below + beyond) // 2
        below, beyond = (middle, beyond) if passes(middle) else (below, middle)
    return below


def reshaped(spec: RunSpec, layers: int, heads: int) -> RunSpec:
    """Return the run with another depth and number of heads, at the same head size."""
    shape = spec.shape
    n_embd, n_kv_head, mlp_width = (
        size * heads // shape.n_head for size in (shape.n_embd, shape.n_kv_head, shape.mlp_width)
    )
    return with_shape(
        spec,
        n_layer=layers,
        n_head=heads,
        n_embd=n_embd,
        n_kv_head=max(1, n_kv_head),
        mlp_width=mlp_width,
    )


def widest(spec: RunSpec, passes: Callable[[RunSpec], bool]) -> RunSpec | None:
    """Return the widest model of the same depth and head size that passes."""
    heads = largest_that(lambda h: passes(reshaped(spec, spec.shape.n_layer, h)))
    return reshaped(spec, spec.shape.n_layer, heads) if heads else None


def deepest(spec: RunSpec, passes: Callable[[RunSpec], bool]) -> RunSpec | None:
    """Return the deepest model of the same width that passes."""
    layers = largest_that(lambda n: passes(reshaped(spec, n, spec.shape.n_head)))
    return reshaped(spec, layers, spec.shape.n_head) if layers else None


def largest_of_aspect(spec: RunSpec, passes: Callable[[RunSpec], bool]) -> RunSpec | None:
    """Return the largest model that passes, with about the same ratio of depth to width.

    One more head is a large step, so the search also tries the depths between the ratio's depth
    at the widest passing width and at the next width, at both widths.
    """
    shape = spec.shape

    def depth(heads: int) -> int:
        return max(1, round(shape.n_layer * heads / shape.n_head))

    heads = largest_that(lambda h: passes(reshaped(spec, depth(h), h)))
    if not heads:
        return None
    least = depth(heads)
    depths = max(1, depth(heads + 1) - least)

    def deepest_of_width(width: int) -> RunSpec | None:
        many = largest_that(lambda n: n <= depths and passes(reshaped(spec, least + n - 1, width)))
        return reshaped(spec, least + many - 1, width) if many else None

    found = filter(None, (deepest_of_width(heads), deepest_of_width(heads + 1)))
    return max(found, key=lambda c: count_parameters(c.shape).without_positions)


IntervalEnd = Literal["low", "expected", "high"]
Predictor = Callable[[RunSpec], Prediction]
"""Predicts a run on the device being planned for."""


def ends_within(predicted: Predictor, spec: RunSpec, seconds: float, end: IntervalEnd) -> bool:
    """Return True if the chosen end of the run's total time is at most `seconds`."""
    total = predicted(spec).best("total_seconds")
    assert total is not None, "a deadline needs a predicted time"
    return bool(getattr(total, end) <= seconds)


def most_steps(predicted: Predictor, spec: RunSpec, seconds: float, end: IntervalEnd) -> int:
    """Return the largest number of steps that end within `seconds`, or 0."""
    return largest_that(lambda n: ends_within(predicted, replace(spec, steps=n), seconds, end))


def trained_on(spec: RunSpec, tokens_per_parameter: float) -> RunSpec:
    """Return the run with steps for this many tokens per parameter, positions excluded."""
    parameters = count_parameters(spec.shape).without_positions
    steps = math.ceil(tokens_per_parameter * parameters / spec.tokens_per_step)
    return replace(spec, steps=steps)

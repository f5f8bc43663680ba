"""What fits into a device's memory: the verdict, the largest micro-batch, the largest models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nanogauge.predict.memory import Copied, Memory, predict_memory
from nanogauge.predict.parameters import count_parameters
from nanogauge.predict.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.records import Hardware
from nanogauge.runspec import RunSpec, with_shape
from nanogauge.schedule import checkpoints

Verdict = Literal["fits", "doubtful", "does not fit"]


def fit_verdict(peak: Interval, free_bytes: float) -> Verdict:
    """Whether a peak that is only known as an interval fits; doubtful where both are possible."""
    if peak.low > free_bytes:
        return "does not fit"
    return "fits" if peak.high <= free_bytes else "doubtful"


def memory_of(spec: RunSpec, hardware: Hardware) -> Memory:
    """Return the peak memory of each of the devices that share this run."""
    copies = checkpoints(spec)
    copied: Copied = "in training" if copies > 1 else "at the end" if copies else "never"
    return predict_memory(workload_of(spec, hardware.kind != "cpu"), hardware, copied)


def is_expected_to_fit(spec: RunSpec, hardware: Hardware, free_bytes: float) -> bool:
    return memory_of(spec, hardware).process.expected <= free_bytes


def with_micro_batch(spec: RunSpec, micro: int) -> RunSpec:
    """The same tokens per step in other micro-batches; micro divides the sequences of a step."""
    sequences = spec.micro_batch * spec.grad_accum
    return replace(spec, micro_batch=micro, grad_accum=sequences // micro)


def largest_micro_batch(
    spec: RunSpec,
    hardware: Hardware,
    free: float,
    end: Literal["expected", "high"] = "expected",
) -> int | None:
    """The largest micro-batch with the same tokens per step whose peak fits into free bytes.

    Of the peak's interval, `end` has to fit: with "high" the micro-batch is sure to.
    """
    sequences = spec.micro_batch * spec.grad_accum // spec.world_size
    below_root = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    for micro in sorted({*below_root, *(sequences // d for d in below_root)}, reverse=True):
        peak = memory_of(with_micro_batch(spec, micro), hardware).process
        if (peak.expected if end == "expected" else peak.high) <= free:
            return micro
    return None


def largest_that(passes: Callable[[int], bool]) -> int:
    """The largest n from 1 on that passes, 0 if none; whoever fails, all above it fail too."""
    beyond = 1
    while passes(beyond):
        beyond *= 2
    below = beyond // 2
    while beyond - below > 1:
        middle = (below + beyond) // 2
        below, beyond = (middle, beyond) if passes(middle) else (below, middle)
    return below


def reshaped(spec: RunSpec, layers: int, heads: int) -> RunSpec:
    """A model of other depth and width, its heads of the same size."""
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
    """The widest model of the same depth and head size that passes."""
    heads = largest_that(lambda h: passes(reshaped(spec, spec.shape.n_layer, h)))
    return reshaped(spec, spec.shape.n_layer, heads) if heads else None


def deepest(spec: RunSpec, passes: Callable[[RunSpec], bool]) -> RunSpec | None:
    """The deepest model of the same width that passes."""
    layers = largest_that(lambda n: passes(reshaped(spec, n, spec.shape.n_head)))
    return reshaped(spec, layers, spec.shape.n_head) if layers else None


def largest_of_aspect(spec: RunSpec, passes: Callable[[RunSpec], bool]) -> RunSpec | None:
    """The largest model that passes, its depth over width as near as can be to the given one's.

    As one more head is a large step, the depths between that of the widest model with the nearest
    depth and that of the next width are tried at both widths.
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

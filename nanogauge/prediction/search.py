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
from nanogauge.runspec import RunSpec
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


IntervalEnd = Literal["low", "expected", "high"]
Predictor = Callable[[RunSpec], Prediction]
"""Predicts a run on the device being planned for."""


def trained_on(spec: RunSpec, tokens_per_parameter: float) -> RunSpec:
    """Return the run with steps for this many tokens per parameter, positions excluded."""
    parameters = count_parameters(spec.shape).without_positions
    steps = math.ceil(tokens_per_parameter * parameters / spec.tokens_per_step)
    return replace(spec, steps=steps)

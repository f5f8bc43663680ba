"""Search for what fits: into memory (micro-batch, model), and into the time until a deadline."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Literal, get_args

from nanogauge.prediction.memory import Copied, Memory, predict_memory
from nanogauge.prediction.step_time import predict_step_time
from nanogauge.prediction.traced import traced_memory
from nanogauge.prediction.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints
from nanogauge.schema import Hardware, Prediction
from nanogauge.spec_parts import Head

Verdict = Literal["fits", "doubtful", "does not fit"]


def fit_verdict(peak: Interval, free_bytes: float) -> Verdict:
    """Return whether a predicted peak fits; doubtful if the free memory lies in its interval."""
    if peak.low > free_bytes:
        return "does not fit"
    return "fits" if peak.high <= free_bytes else "doubtful"


def memory_of(spec: RunSpec, hardware: Hardware) -> Memory:
    """Return the predicted peak memory on each device of the run."""
    if spec.traced is not None:
        return traced_memory(spec.traced, hardware)
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

    `end` is the end of the peak's interval that must fit: "expected", or "high" to be sure. None if no micro-batch
    fits.
    """
    sequences = spec.micro_batch * spec.grad_accum // spec.world_size
    below_root = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    for micro in sorted({*below_root, *(sequences // d for d in below_root)}, reverse=True):
        peak = memory_of(with_micro_batch(spec, micro), hardware).process
        if (peak.expected if end == "expected" else peak.high) <= free:
            return micro
    return None


FASTER_FLAGS = {
    "head": "train.head",
    "micro_batch": "train.micro-batch",
    "grad_accum": "train.grad-accum",
    "tuned": "run.tune",
}
"""Field of RunSpec -> flag of a setting that changes the speed and not what is computed."""


def faster_flags(spec: RunSpec, hardware: Hardware, free: float) -> tuple[str, float] | None:
    """Return the flags of the fastest settings that are sure to fit, and its step over the run's.

    None if they save less than 1 %, or if the run is not train.py's on one GPU.
    """
    sequences = spec.micro_batch * spec.grad_accum
    micro_batches = [m for m in (spec.micro_batch, 2 * spec.micro_batch) if sequences % m == 0]
    runs = [
        replace(with_micro_batch(spec, micro), head=head, tuned=tuned)
        for micro, head, tuned in product(micro_batches, get_args(Head), {spec.tuned, spec.compile})
    ]
    fastest, share = _fastest(spec, runs, hardware, free)
    if fastest is spec:
        return None
    values = {flag: (getattr(spec, f), getattr(fastest, f)) for f, flag in FASTER_FLAGS.items()}
    flags = [f"--{f} {str(new).lower()}" for f, (old, new) in values.items() if new != old]
    return " ".join(flags), share


def choose_head(spec: RunSpec, hardware: Hardware, free: float) -> Head:
    """Return the head of train.head = auto: plain if it saves 1 % and is sure to fit, else chunked."""
    chunked, plain = (replace(spec, head=head) for head in ("chunked", "plain"))
    return _fastest(chunked, [plain], hardware, free)[0].head


def _fastest(spec: RunSpec, runs: list[RunSpec], hardware: Hardware, free: float) -> tuple[RunSpec, float]:
    """Return the fastest of the runs that are sure to fit, and its step over the given run's.

    The given run if no other saves 1 %, or if it is not train.py's on one GPU.
    """

    def seconds(run: RunSpec) -> float:
        step = predict_step_time(workload_of(run, on_gpu=True), hardware)
        return step.seconds if step is not None else math.inf

    if spec.program.name == "nanogauge" and hardware.kind != "cpu" and spec.world_size == 1:
        sure = [run for run in runs if memory_of(run, hardware).process.high <= free]
        fastest = min(sure, key=seconds, default=spec)
        if (share := seconds(fastest) / seconds(spec)) <= 0.99:
            return fastest, share
    return spec, 1.0


IntervalEnd = Literal["low", "expected", "high"]
Predictor = Callable[[RunSpec], Prediction]
"""Predicts a run on the device being planned for."""

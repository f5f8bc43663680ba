"""What fits into a device's memory: the verdict, the largest micro-batch, the largest models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from nanogauge.config import Config
from nanogauge.prediction.memory import Copied, Memory, predict_memory
from nanogauge.prediction.parameters import count_parameters
from nanogauge.prediction.workload import shape_of, workload_of
from nanogauge.quantities import Interval
from nanogauge.schema import Hardware

Verdict = Literal["fits", "doubtful", "does not fit"]


def fit_verdict(peak: Interval, free_bytes: float) -> Verdict:
    """Whether a peak that is only known as an interval fits; doubtful where both are possible."""
    if peak.low > free_bytes:
        return "does not fit"
    return "fits" if peak.high <= free_bytes else "doubtful"


def memory_of(config: Config, hardware: Hardware, dtype: str, gpus: int = 1) -> Memory:
    """Peak memory of each of the devices that share this run."""
    copied: Copied = "in training"
    if config.train.checkpoint_every >= config.train.max_steps:
        copied = "at the end"
    work = workload_of(config, dtype, hardware.kind != "cpu", gpus)
    return predict_memory(work, hardware, copied)


def is_expected_to_fit(
    config: Config, hardware: Hardware, dtype: str, free_bytes: float, gpus: int = 1
) -> bool:
    return memory_of(config, hardware, dtype, gpus).process.expected <= free_bytes


def with_train(config: Config, **values: int) -> Config:
    """Return the configuration with other values in its train section."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def with_micro_batch(config: Config, micro: int) -> Config:
    """The same tokens per step in other micro-batches; micro divides the sequences of a step."""
    sequences = config.train.micro_batch * config.train.grad_accum
    return with_train(config, micro_batch=micro, grad_accum=sequences // micro)


def largest_micro_batch(
    config: Config,
    hardware: Hardware,
    dtype: str,
    free: float,
    gpus: int = 1,
    end: Literal["expected", "high"] = "expected",
) -> int | None:
    """The largest micro-batch with the same tokens per step whose peak fits into free bytes.

    Of the peak's interval, `end` has to fit: with "high" the micro-batch is sure to.
    """
    sequences = config.train.micro_batch * config.train.grad_accum // gpus
    below_root = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    for micro in sorted({*below_root, *(sequences // d for d in below_root)}, reverse=True):
        peak = memory_of(with_micro_batch(config, micro), hardware, dtype, gpus).process
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


def reshaped(config: Config, layers: int, heads: int) -> Config:
    """A model of other depth and width, its heads of the same size."""
    head_size = config.model.n_embd // config.model.n_head
    shape = {"n_layer": layers, "n_head": heads, "n_embd": heads * head_size}
    return config.model_copy(update={"model": config.model.model_copy(update=shape)})


def widest(config: Config, passes: Callable[[Config], bool]) -> Config | None:
    """The widest model of the same depth and head size that passes."""
    heads = largest_that(lambda h: passes(reshaped(config, config.model.n_layer, h)))
    return reshaped(config, config.model.n_layer, heads) if heads else None


def deepest(config: Config, passes: Callable[[Config], bool]) -> Config | None:
    """The deepest model of the same width that passes."""
    layers = largest_that(lambda n: passes(reshaped(config, n, config.model.n_head)))
    return reshaped(config, layers, config.model.n_head) if layers else None


def largest_of_aspect(config: Config, passes: Callable[[Config], bool]) -> Config | None:
    """The largest model that passes, its depth over width as near as can be to the given one's.

    As one more head is a large step, the depths between that of the widest model with the nearest
    depth and that of the next width are tried at both widths.
    """
    model = config.model

    def depth(heads: int) -> int:
        return max(1, round(model.n_layer * heads / model.n_head))

    heads = largest_that(lambda h: passes(reshaped(config, depth(h), h)))
    if not heads:
        return None
    least = depth(heads)
    depths = max(1, depth(heads + 1) - least)

    def deepest_of_width(width: int) -> Config | None:
        many = largest_that(
            lambda n: n <= depths and passes(reshaped(config, least + n - 1, width))
        )
        return reshaped(config, least + many - 1, width) if many else None

    found = filter(None, (deepest_of_width(heads), deepest_of_width(heads + 1)))
    return max(found, key=lambda c: count_parameters(shape_of(c.model)).without_positions)

"""The learning rate of each step."""

from __future__ import annotations

import math

from nanogauge.config import OptimizerSection


def learning_rate(step: int, optimizer: OptimizerSection, max_steps: int) -> float:
    """Linear warm-up, then down to min_learning_rate at decay_steps, then constant.

    Down along a cosine, or, with "wsd", level and for the last decay_share in a straight line.

    Source: Loshchilov and Hutter 2017 (cosine); Hu et al. 2024, MiniCPM, and Haegele et al. 2024
    (warm-up, stable, decay); the first step is 1 / (warmup + 1), as in nanoGPT.
    """
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    end = optimizer.decay_steps or max_steps
    if step >= end:
        return optimizer.min_learning_rate
    if optimizer.schedule == "wsd":
        share = min(1.0, (end - step) / (optimizer.decay_share * end))
    else:
        progress = (step - optimizer.warmup_steps) / (end - optimizer.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_learning_rate + share * (
        optimizer.learning_rate - optimizer.min_learning_rate
    )

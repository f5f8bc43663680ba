"""The learning rate of each step."""

from __future__ import annotations

import math

from nanogauge.config import OptimizerSection


def learning_rate(step: int, optimizer: OptimizerSection, max_steps: int) -> float:
    """Linear warm-up, then a cosine down to min_learning_rate at decay_steps, then constant.

    Source: Loshchilov and Hutter 2017 (cosine); the first step is 1 / (warmup + 1), as in nanoGPT.
    """
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    end = optimizer.decay_steps or max_steps
    if step >= end:
        return optimizer.min_learning_rate
    progress = (step - optimizer.warmup_steps) / (end - optimizer.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_learning_rate + share * (
        optimizer.learning_rate - optimizer.min_learning_rate
    )

"""Schedules: learning rate, and the steps that evaluate, sample text and save a checkpoint."""

import math

from nanogauge.runspec import RunSpec
from nanogauge.spec_parts import Schedule


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Return the learning rate: linear warm-up, then decay to min_learning_rate, then constant.

    The first step has 1 / (warmup_steps + 1) of the peak, as in nanoGPT. "wsd" (warmup-stable-decay) is constant, then
    linear for the last decay_share.

    Source: Loshchilov and Hutter 2017 (cosine); Hu et al. 2024, MiniCPM, and Haegele et al. 2024 (wsd).
    """
    peak, least = schedule.learning_rate, schedule.min_learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.decay == "constant":
        return peak
    end = schedule.decay_steps or steps
    if step >= end:
        return least
    if schedule.decay == "wsd":
        share = min(1.0, (end - step) / (schedule.decay_share * end))
    else:
        progress = (step - schedule.warmup_steps) / (end - schedule.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return least + share * (peak - least)


def is_evaluated(step: int, spec: RunSpec) -> bool:
    """Return True if an evaluation is due after `step` steps: at 0, multiples and the end."""
    return _is_due(step, spec.eval_every, spec.steps)


def is_checkpointed(step: int, spec: RunSpec) -> bool:
    """Return True if a checkpoint is due after `step` steps: at multiples and the end."""
    return step > 0 and _is_due(step, spec.checkpoint_every, spec.steps)


def is_sampled(step: int, spec: RunSpec) -> bool:
    """Return True if the evaluation at this step samples text: the first in each quarter."""
    assert spec.eval_every
    before = max(0, (step - 1) // spec.eval_every * spec.eval_every)
    return step > 0 and 4 * step // spec.steps > 4 * before // spec.steps


def evaluations(spec: RunSpec, first: int = 0) -> int:
    """Count the evaluations from step `first` on; 0 if eval_every is unknown."""
    return _count(first, spec.eval_every, spec.steps)


def checkpoints(spec: RunSpec, first: int = 1) -> int:
    """Count the checkpoints from step `first` on; 0 if checkpoint_every is unknown."""
    return _count(max(first, 1), spec.checkpoint_every, spec.steps)


def _is_due(step: int, every: int | None, steps: int) -> bool:
    return bool(every) and (step % (every or 1) == 0 or step == steps)


def _count(first: int, every: int | None, steps: int) -> int:
    """Count the multiples of `every` from `first` to steps - 1, plus the last step."""
    return (steps - 1) // every - (first - 1) // every + 1 if every else 0

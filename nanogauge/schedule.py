"""Learning rate of each step, and which steps evaluate, sample text and write a checkpoint."""

from __future__ import annotations

import math

from nanogauge.runspec import RunSpec, Schedule


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Return the learning rate: linear warm-up, then decay to min_learning_rate, then constant.

    The decay is a cosine, or, with "wsd", constant and then linear for the last decay_share.

    Source: Loshchilov and Hutter 2017 (cosine); Hu et al. 2024, MiniCPM, and Haegele et al. 2024
    (warm-up, stable, decay); the first step is 1 / (warmup + 1), as in nanoGPT.
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
    """Return True if the model is evaluated after this number of steps: 0, multiples, the last."""
    return _is_due(step, spec.eval_every, spec.steps)


def is_checkpointed(step: int, spec: RunSpec) -> bool:
    """Return True if a checkpoint is due after this number of steps: multiples, and the last."""
    return step > 0 and _is_due(step, spec.checkpoint_every, spec.steps)


def is_sampled(step: int, spec: RunSpec) -> bool:
    """Return True if the evaluation at this step, a due one, is the first in a quarter of the run.

    Text is sampled there.
    """
    assert spec.eval_every
    before = max(0, (step - 1) // spec.eval_every * spec.eval_every)
    return step > 0 and 4 * step // spec.steps > 4 * before // spec.steps


def evaluations(spec: RunSpec, first: int = 0) -> int:
    """Count the evaluations from step `first` on; 0 if their cadence is unknown."""
    return _count(first, spec.eval_every, spec.steps)


def checkpoints(spec: RunSpec, first: int = 1) -> int:
    """Count the checkpoints from step `first` on; 0 if their cadence is unknown."""
    return _count(max(first, 1), spec.checkpoint_every, spec.steps)


def _is_due(step: int, every: int | None, steps: int) -> bool:
    return bool(every) and (step % (every or 1) == 0 or step == steps)


def _count(first: int, every: int | None, steps: int) -> int:
    """Count the multiples of `every` in first .. steps - 1, and the end of the run."""
    return (steps - 1) // every - (first - 1) // every + 1 if every else 0

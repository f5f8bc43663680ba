"""What ends in time: the most steps of a configuration, and the largest model of its aspect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nanogauge.predict.fit import (
    is_expected_to_fit,
    largest_micro_batch,
    largest_of_aspect,
    largest_that,
    with_micro_batch,
)
from nanogauge.predict.parameters import count_parameters
from nanogauge.records import Prediction
from nanogauge.runspec import RunSpec

TOKENS_PER_PARAMETER = 20.0
"""where a fixed number of FLOPs gives the lowest loss. Source: Hoffmann et al. 2022 (Chinchilla)"""

IntervalEnd = Literal["low", "expected", "high"]
Predictor = Callable[[RunSpec], Prediction]
"""what predicts a configuration on the device that is planned for"""


def with_steps(spec: RunSpec, steps: int) -> RunSpec:
    return replace(spec, steps=steps)


def ends_within(predicted: Predictor, spec: RunSpec, seconds: float, end: IntervalEnd) -> bool:
    """Whether the whole run takes at most so long; by the low, expected or high end of its time."""
    total = predicted(spec).best("total_seconds")
    assert total is not None, "only what has a time can have a deadline"
    return bool(getattr(total, end) <= seconds)


def most_steps(predicted: Predictor, spec: RunSpec, seconds: float, end: IntervalEnd) -> int:
    """The most steps of this configuration that end in time; 0 where not even one does."""
    return largest_that(lambda n: ends_within(predicted, with_steps(spec, n), seconds, end))


def trained_on(spec: RunSpec, tokens_per_parameter: float) -> RunSpec:
    """As many steps as give each parameter so many tokens; positions are not counted."""
    parameters = count_parameters(spec.shape).without_positions
    steps = math.ceil(tokens_per_parameter * parameters / spec.tokens_per_step)
    return with_steps(spec, steps)


def largest_model_in_time(
    predicted: Predictor, spec: RunSpec, seconds: float, free: float, tokens_per_parameter: float
) -> RunSpec | None:
    """The largest model of the same aspect that is expected to fit and to end in time.

    It gets tokens_per_parameter tokens for each of its parameters, and the given micro-batch, or
    the largest that fits at the same tokens per step.
    """
    plan = predicted(spec)
    device = (plan.hardware, free)

    def made_to_fit(candidate: RunSpec) -> RunSpec | None:
        if is_expected_to_fit(candidate, *device):
            return candidate
        micro = largest_micro_batch(candidate, *device)
        return with_micro_batch(candidate, micro) if micro is not None else None

    def passes(candidate: RunSpec) -> bool:
        fitting = made_to_fit(trained_on(candidate, tokens_per_parameter))
        return fitting is not None and ends_within(predicted, fitting, seconds, "expected")

    found = largest_of_aspect(spec, passes)
    return made_to_fit(trained_on(found, tokens_per_parameter)) if found is not None else None

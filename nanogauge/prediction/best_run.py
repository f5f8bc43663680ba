"""Search for the model with the lowest predicted loss that ends in a given time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanogauge.prediction.loss import LossEstimate, LossInputs, gpt_parameters, predict_loss

LAYERS = (*range(6, 17), 18, 20, 22, 24, 28, 32, 36)
HEAD_WIDTH = 64
ASPECTS = (13, 80)
"""Smallest and largest ratio of width to depth."""
LEAST_TOKENS_PER_PARAMETER = 10.0
"""Smallest ratio to search; with fewer tokens the scaling law predicts too low a loss."""
LEAST_TOKENS = 1e9
MOST_PASSES = 15.0
EVIDENCE_SHAPES = ((6, 384), (12, 384), (12, 768), (16, 1024), (24, 1024), (52, 1536))
"""(layers, width) of published runs that the scaling law was fitted to."""
INDIFFERENT, ALTERNATIVE = 0.004, 0.015
"""Nats above the lowest loss within which a run counts as equally good, or as an alternative."""


@dataclass(frozen=True)
class BestRun:
    inputs: LossInputs
    seconds: float
    loss: LossEstimate

    @property
    def distance_from_evidence(self) -> float:
        """Log-scale distance of layers and width from the nearest published run."""
        shape = self.inputs
        return min(
            math.hypot(math.log(shape.layers / layers), math.log(shape.width / width))
            for layers, width in EVIDENCE_SHAPES
        )


def best_runs(
    seconds: float,
    time_of: Callable[[int, int], tuple[float, float] | None],
    fits: Callable[[int, int], bool],
    like: LossInputs,
    batch_tokens: float,
    vocabulary: int = 50304,
    most: int = 4,
) -> list[BestRun]:
    """Return the run with the lowest expected loss that ends in time, then its alternatives.

    Runs below 10 tokens per parameter are excluded, as are those below 1 G tokens where
    others have more. Within 0.004 of the lowest loss, the nearest to EVIDENCE_SHAPES is first.

    Args:
        seconds: available time.
        time_of: start-up time and time per step of layers and width; None without a prediction.
        fits: whether a model of these layers and this width fits the device's memory.
        like: data, recipe and schedule; size, tokens and steps are replaced.
        batch_tokens: tokens of a step.
        vocabulary: rows of the head.
        most: largest number of runs to return.
    """
    found = []
    for layers in LAYERS:
        first, last = (math.floor(aspect * layers / HEAD_WIDTH) for aspect in ASPECTS)
        for width in range((first + 1) * HEAD_WIDTH, last * HEAD_WIDTH + 1, HEAD_WIDTH):
            time = time_of(layers, width) if fits(layers, width) else None
            if time is None:
                continue
            parameters = gpt_parameters(layers, width, vocabulary)
            most_tokens = MOST_PASSES * (like.unique_tokens or math.inf)
            steps = math.floor(min((seconds - time[0]) / time[1], most_tokens / batch_tokens))
            if steps * batch_tokens < LEAST_TOKENS_PER_PARAMETER * parameters:
                continue
            shape = {"layers": layers, "width": width, "parameters": parameters}
            inputs = replace(like, **shape, steps=steps, tokens=steps * batch_tokens)
            loss = predict_loss(inputs)
            if isinstance(loss, LossEstimate):
                found.append(BestRun(inputs, time[0] + steps * time[1], loss))
    found = [run for run in found if run.inputs.tokens >= LEAST_TOKENS] or found
    lowest = min((run.loss.expected for run in found), default=math.inf)
    near = [run for run in found if run.loss.expected <= lowest + ALTERNATIVE]
    near.sort(
        key=lambda run: (run.loss.expected > lowest + INDIFFERENT, run.distance_from_evidence)
    )
    return near[:most]

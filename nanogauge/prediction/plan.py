"""Plan a run: does it fit into memory, when does it end, and what would fit or end in time.

These are the records that `nanogauge plan --json` prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from nanogauge.errors import BadInput
from nanogauge.prediction.search import (
    IntervalEnd,
    Predictor,
    Verdict,
    deepest,
    fit_verdict,
    is_expected_to_fit,
    largest_micro_batch,
    largest_model_in_time,
    largest_of_aspect,
    memory_of,
    most_steps,
    widest,
)
from nanogauge.quantities import Interval, next_time, time_after
from nanogauge.runspec import RunSpec
from nanogauge.schema import FreeMemory, Stored

Search = Callable[[RunSpec, Callable[[RunSpec], bool]], RunSpec | None]
"""Returns the largest model that passes: widest, deepest or largest_of_aspect of search.py."""


class Candidate(Stored):
    """A model that could be trained instead, and what it would need."""

    n_layer: int
    n_head: int
    n_embd: int
    parameters: int
    """Without position embeddings."""
    micro_batch: int
    grad_accum: int
    max_steps: int
    tokens: int
    peak_process_bytes: float
    verdict: Verdict
    step_seconds: Interval | None
    """None if no time is predicted on this hardware."""
    total_seconds: Interval | None


class FittingModels(Stored):
    """The largest models whose expected peak fits at the given micro-batch; None if none does."""

    widest: Candidate | None
    """Same depth and head size."""
    deepest: Candidate | None
    """Same width."""
    same_aspect: Candidate | None
    """Same head size, and about the same ratio of depth to width."""


class Fit(Stored):
    fits: bool
    """Whether the expected peak fits."""
    verdict: Verdict
    """Doubtful if the free memory lies inside the peak's interval."""
    certain: bool
    peak_process_bytes: float
    free_bytes: int
    free_source: str
    largest_micro_batch: int | None
    """Largest with an expected peak that fits, at the same tokens per step; None if none."""
    largest_sure_micro_batch: int | None
    """Largest with a peak that fits even at the high end; None if none."""
    models: FittingModels | None
    """None unless requested."""


class Finish(Stored):
    """Local times with their UTC offset; None if more than a century away."""

    low: datetime | None
    expected: datetime | None
    high: datetime | None


class Steps(Stored):
    """The most optimizer steps that end in time: low if every step is slow, high if all are fast.

    0 if not even one does.
    """

    low: int
    expected: int
    high: int


class Deadline(Stored):
    start: datetime
    finish: Finish | None
    """None if no time is predicted on this hardware."""
    preparation_seconds: Interval | None
    """Time to prepare the data; None if it exists, or if its size is unknown."""
    by: datetime | None
    steps: Steps | None
    tokens: Steps | None
    tokens_per_parameter: float | None
    model: Candidate | None
    """The largest of about the same shape that fits and ends in time with these tokens."""


@dataclass(frozen=True)
class Wish:
    """The start, the deadline and the tokens per parameter that the user asked for."""

    start: datetime
    by: datetime | None
    tokens_per_parameter: float


def plan_fit(spec: RunSpec, predicted: Predictor, free: FreeMemory, models: bool) -> Fit:
    """Return whether the run fits into the free memory, and which other models would."""
    prediction = predicted(spec)
    hardware = prediction.hardware
    memory = memory_of(spec, hardware)
    verdict = fit_verdict(memory.process, free.bytes)

    def fits(candidate: RunSpec) -> bool:
        return is_expected_to_fit(candidate, hardware, free.bytes)

    def largest(search: Search) -> Candidate | None:
        found = search(spec, fits)
        return _candidate(found, predicted, free) if found is not None else None

    return Fit(
        fits=memory.process.expected <= free.bytes,
        verdict=verdict,
        certain=verdict != "doubtful",
        peak_process_bytes=memory.process.expected,
        free_bytes=free.bytes,
        free_source=free.source,
        largest_micro_batch=largest_micro_batch(spec, hardware, free.bytes),
        largest_sure_micro_batch=largest_micro_batch(spec, hardware, free.bytes, "high"),
        models=FittingModels(
            widest=largest(widest), deepest=largest(deepest), same_aspect=largest(largest_of_aspect)
        )
        if models
        else None,
    )


def _candidate(spec: RunSpec, predicted: Predictor, free: FreeMemory) -> Candidate:
    plan = predicted(spec)
    found = plan.quantities
    shape = spec.shape
    return Candidate(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        parameters=int(found["parameters"].expected),
        micro_batch=spec.micro_batch,
        grad_accum=spec.grad_accum,
        max_steps=spec.steps,
        tokens=spec.tokens_per_step * spec.steps,
        peak_process_bytes=found["peak_process_bytes"].expected,
        verdict=fit_verdict(memory_of(spec, plan.hardware).process, free.bytes),
        step_seconds=plan.best("step_seconds"),
        total_seconds=plan.best("total_seconds"),
    )


def plan_deadline(
    spec: RunSpec,
    predicted: Predictor,
    free: FreeMemory,
    wish: Wish,
    preparation: Interval | None,
) -> Deadline:
    """Return when the run ends if it starts at wish.start, and what would end by wish.by.

    Args:
        spec: the run.
        predicted: its prediction on the device that is planned for.
        free: memory of each device.
        wish: the start and the deadline.
        preparation: time to prepare the data before the run; None if there is nothing to do.
    """
    total = predicted(spec).best("total_seconds")
    finish = steps = tokens = model = None
    if total is not None:
        ends = (
            time_after(wish.start, seconds) for seconds in (total.low, total.expected, total.high)
        )
        finish = Finish(**dict(zip(("low", "expected", "high"), ends, strict=True)))
    if total is not None and wish.by is not None:
        seconds = wish.by.timestamp() - wish.start.timestamp()

        def in_time(end: IntervalEnd) -> int:
            return most_steps(predicted, spec, seconds, end)

        steps = Steps(low=in_time("high"), expected=in_time("expected"), high=in_time("low"))
        per_step = spec.tokens_per_step
        tokens = Steps(
            low=per_step * steps.low,
            expected=per_step * steps.expected,
            high=per_step * steps.high,
        )
        largest = largest_model_in_time(
            predicted, spec, seconds, free.bytes, wish.tokens_per_parameter
        )
        model = _candidate(largest, predicted, free) if largest is not None else None
    return Deadline(
        start=wish.start,
        finish=finish,
        preparation_seconds=preparation,
        by=wish.by,
        steps=steps,
        tokens=tokens,
        tokens_per_parameter=wish.tokens_per_parameter if wish.by is not None else None,
        model=model,
    )


def make_wish(
    now: datetime, start: str | None, by: str | None, tokens_per_parameter: float
) -> Wish:
    """Resolve the times of day of the command line: start is after now, by is after start.

    Raises:
        BadInput: if one is not a time of day, or the ratio is not positive.
    """
    if not 0 < tokens_per_parameter < math.inf:
        raise BadInput("--tokens-per-parameter must be above 0; 20 is Chinchilla's.")
    begin = next_time(start, now, "--start") if start is not None else now
    end = next_time(by, begin, "--by") if by is not None else None
    return Wish(start=begin, by=end, tokens_per_parameter=tokens_per_parameter)

"""Plan runs: whether each fits into memory, when it ends, and what would end by a deadline.

These are the records that `nanogauge plan --json` prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.prediction.search import (
    IntervalEnd,
    Predictor,
    Verdict,
    deepest,
    fit_verdict,
    is_expected_to_fit,
    largest_micro_batch,
    largest_of_aspect,
    memory_of,
    most_steps,
    widest,
)
from nanogauge.quantities import Interval, next_time, time_after
from nanogauge.runspec import RunSpec, Schedule
from nanogauge.schema import FreeMemory, Prediction, Stored

Search = Callable[[RunSpec, Callable[[RunSpec], bool]], RunSpec | None]
"""Returns the largest model for which a check passes: widest, deepest, ... of search.py."""


class Candidate(Stored):
    """A model that could be trained instead, and what it would need."""

    n_layer: int
    n_head: int
    n_embd: int
    parameters: int
    """Parameters without position embeddings."""
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
    """Widest model of the same depth and head size."""
    deepest: Candidate | None
    """Deepest model of the same width."""
    same_aspect: Candidate | None
    """Largest model of the same head size and about the same ratio of depth to width."""


class Fit(Stored):
    fits: bool
    """True if the expected peak fits into the free memory."""
    verdict: Verdict
    """Doubtful if the free memory lies inside the peak's interval."""
    certain: bool
    peak_process_bytes: float
    free_bytes: int
    free_source: str
    largest_micro_batch: int | None
    """Largest micro-batch whose expected peak fits, at the same tokens per step; None if none."""
    largest_sure_micro_batch: int | None
    """Largest micro-batch that fits even at the high end of the peak's interval; None if none."""
    models: FittingModels | None
    """Largest models that fit; None unless requested."""


class Finish(Stored):
    """Local times of the end of a run, with UTC offset; None if more than a century away."""

    low: datetime | None
    expected: datetime | None
    high: datetime | None

    @classmethod
    def after(cls, start: datetime, seconds: Interval) -> Finish:
        ends = [time_after(start, value) for value in (seconds.low, seconds.expected, seconds.high)]
        return cls(low=ends[0], expected=ends[1], high=ends[2])


class Steps(Stored):
    """Most optimizer steps, or their tokens, that end in time (0 if none); low: slow steps."""

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


@dataclass(frozen=True)
class Wish:
    """The start and the deadline that the user asked for."""

    start: datetime
    by: datetime | None


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
    spec: RunSpec, predicted: Predictor, wish: Wish, preparation: Interval | None
) -> Deadline:
    """Return when the run ends if it starts at wish.start, and how much of it ends by wish.by.

    `preparation` is the time to prepare the data before the run; None if there is nothing to do.
    """
    total = predicted(spec).best("total_seconds")
    finish = steps = tokens = None
    if total is not None:
        finish = Finish.after(wish.start, total)
    if total is not None and wish.by is not None:
        seconds = wish.by.timestamp() - wish.start.timestamp()

        def in_time(end: IntervalEnd) -> int:
            return most_steps(predicted, spec, seconds, end)

        steps = Steps(low=in_time("high"), expected=in_time("expected"), high=in_time("low"))
        in_tokens = {end: spec.tokens_per_step * n for end, n in steps.model_dump().items()}
        tokens = Steps(**in_tokens)
    return Deadline(
        start=wish.start,
        finish=finish,
        preparation_seconds=preparation,
        by=wish.by,
        steps=steps,
        tokens=tokens,
    )


def make_wish(now: datetime, start: str | None, by: str | None) -> Wish:
    """Resolve the times of day of the command line: start is after now, by is after start."""
    begin = next_time(start, now, "--start") if start is not None else now
    end = next_time(by, begin, "--by") if by is not None else None
    return Wish(start=begin, by=end)


def recipe_sentence(spec: RunSpec) -> str:
    """Return a sentence on the architecture, optimizer and learning rate of the run."""
    by = "AdamW"
    if spec.optimizer.name == "muon":
        by = "Muon for the matrices of the blocks and AdamW for the rest"
    sentence = f"Recipe: {_model_words(spec)}; {by}"
    if spec.schedule is None:
        return f"{sentence}."
    return f"{sentence}; learning rate {schedule_words(spec.schedule, spec.steps)}."


def is_another_recipe(spec: RunSpec) -> bool:
    """Return True if the model is not GPT-2's, dropout aside, or the optimizer is not AdamW."""
    return spec.optimizer.name == "muon" or _model_words(replace(spec, dropout=None)) != "GPT-2"


def schedule_words(schedule: Schedule, steps: int) -> str:
    """Describe the learning rate over a run of this many steps."""
    warmup = schedule.warmup_steps
    words = f"{schedule.learning_rate:g} from the first step on"
    if warmup:
        words = f"up to {schedule.learning_rate:g} in {warmup:,} steps"
    if steps <= warmup:
        return f"{words}, of which there are {steps:,}"
    if schedule.decay == "constant":
        return f"{words}, level to the end"
    end = schedule.decay_steps or steps
    if schedule.decay == "wsd":
        level = max(warmup, int(end - schedule.decay_share * end + 1e-6))
        way = f"level to step {level:,}, straight down"
    else:
        way = "down along a cosine"
    beyond = ", after the end of the run" if end > steps else ""
    return f"{words}, {way} to {schedule.min_learning_rate:g} at step {end:,}{beyond}"


def cut_sentences(spec: RunSpec, steps: int, sure: int) -> list[str]:
    """Return the flags for a run of fewer steps, and its learning rate.

    `steps` are expected to end in time, and `sure` steps end in time even at the high end.
    """
    schedule = spec.schedule
    safely = f" ({sure} to be sure)" if sure else ""
    if schedule is None:
        return [f"For a run of these steps: --train.max-steps {steps}{safely}."]
    flags, shorter = f"--train.max-steps {steps}", schedule
    if schedule.decay_steps is not None and schedule.decay != "constant":
        flags += f" --optimizer.decay-steps {steps}"
        shorter = replace(schedule, decay_steps=steps)
    words = schedule_words(shorter, steps)
    return [f"For a run of these steps: {flags}{safely}; learning rate {words}."]


def _model_words(spec: RunSpec) -> str:
    shape, program = spec.shape, spec.program
    changes = {
        "rotary positions": not shape.position_table,
        "RMS norm without weights": not shape.norm_weights,
        "queries and keys normed": program.qk_norm,
        "squared ReLU": program.squared_relu,
        "a head of its own": not shape.tied_head,
        "projections zero at first": bool(spec.zero_init),
        f"logits within {program.logit_softcap:g}": program.logit_softcap > 0,
        f"dropout {spec.dropout or 0:g}": bool(spec.dropout),
    }
    made = [words for words, is_so in changes.items() if is_so]
    return f"GPT-2 with {', '.join(made)}" if made else "GPT-2"


class Planned(Stored):
    """The plan of one configuration; quantities are calibrated where a calibration exists."""

    config: str
    """Path of the configuration."""
    name: str
    recipe: str | None
    """Sentence on architecture and optimizer; None for GPT-2 trained by AdamW."""
    parameters: int
    """Parameters without position embeddings."""
    tokens: int
    tokens_per_parameter: float
    step_seconds: Interval | None
    """Step time; None, like all derived quantities, if no time is predicted on this hardware."""
    total_seconds: Interval | None
    tokens_per_second: Interval | None
    """Tokens per second of all GPUs together, in a steady step."""
    finish: Finish | None
    peak_process_bytes: Interval
    """Peak memory of the process on each GPU."""
    free_bytes: int
    verdict: Verdict
    energy_kwh: Interval | None
    """Energy of all boards; None if their power is unknown."""
    cost: Interval | None
    """Cost of the run; None without a tariff."""
    currency: str


def plan_all(
    paths: Sequence[Path],
    overrides: Mapping[str, Mapping[str, object]],
    predicted: Callable[[RunSpec], Prediction],
    free_bytes_of: Callable[[Prediction], int],
    start: datetime,
    world_size: int = 1,
) -> list[Planned]:
    """Plan each configuration; shortest run first, those without a predicted time last.

    The overrides apply to each; `free_bytes_of` returns the free memory of each GPU in bytes.
    """
    plans = []
    for path in paths:
        try:
            spec = load_config(path, overrides).to_spec(world_size=world_size)
            plans.append(_planned(path, spec, predicted(spec), free_bytes_of, start))
        except BadInput as error:
            text = str(error)
            raise (error if str(path) in text else BadInput(f"{path}: {text}")) from None
    return sorted(plans, key=lambda p: p.total_seconds.expected if p.total_seconds else math.inf)


def _planned(
    path: Path,
    spec: RunSpec,
    prediction: Prediction,
    free_bytes_of: Callable[[Prediction], int],
    start: datetime,
) -> Planned:
    hardware = prediction.hardware
    free = free_bytes_of(prediction)
    memory = memory_of(spec, hardware)
    step, total = prediction.best("step_seconds"), prediction.best("total_seconds")
    parameters = int(prediction.quantities["parameters"].expected)
    tokens = spec.tokens_per_step * spec.steps
    speed = finish = None
    if step is not None:
        speed = step.map(lambda seconds: spec.tokens_per_step / seconds)
    if total is not None:
        finish = Finish.after(start, total)
    return Planned(
        config=str(path),
        name=spec.name or path.stem,
        recipe=recipe_sentence(spec) if is_another_recipe(spec) else None,
        parameters=parameters,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters,
        step_seconds=step,
        total_seconds=total,
        tokens_per_second=speed,
        finish=finish,
        peak_process_bytes=memory.process,
        free_bytes=free,
        verdict=fit_verdict(memory.process, free),
        energy_kwh=prediction.best("energy_kwh"),
        cost=prediction.best("cost"),
        currency=spec.cost.currency,
    )

"""Plan several configurations for the same GPU: the table of plan.py --compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.prediction.plan import Finish
from nanogauge.prediction.search import Verdict, fit_verdict, memory_of
from nanogauge.quantities import Interval, time_after, tokens_per_second
from nanogauge.runspec import RunSpec, Schedule
from nanogauge.schedule import learning_rate
from nanogauge.schema import Prediction, Stored


def recipe_sentence(spec: RunSpec) -> str:
    """Return a sentence on what distinguishes the run from others of its size."""
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
        level = max(warmup, round((1 - schedule.decay_share) * end))
        way = f"level to step {level:,}, straight down"
    else:
        way = "down along a cosine"
    beyond = ", after the end of the run" if end > steps else ""
    return f"{words}, {way} to {schedule.min_learning_rate:g} at step {end:,}{beyond}"


def cut_sentences(spec: RunSpec, steps: int, sure: int) -> list[str]:
    """Return the flags for a run of fewer steps, and what a run that just stops there misses.

    Args:
        spec: the run as it is planned.
        steps: expected to end in time.
        sure: steps certain to end in time; 0 if not even one is.
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
    sentences = [f"For a run of these steps: {flags}{safely}; learning rate {words}."]
    there = learning_rate(steps, schedule, spec.steps)
    decays = schedule.decay != "constant" and steps >= schedule.warmup_steps
    if decays and there > schedule.min_learning_rate:
        sentences.append(
            f"Stopped then without that, it would still have a learning rate of {there:.2g}, "
            f"{100 * there / schedule.learning_rate:.0f} % of the peak."
        )
    return sentences


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
    """A sentence; None for GPT-2 trained by AdamW."""
    parameters: int
    """Without position embeddings."""
    tokens: int
    tokens_per_parameter: float
    step_seconds: Interval | None
    """None, like the quantities derived from it, if no time is predicted on this hardware."""
    total_seconds: Interval | None
    tokens_per_second: Interval | None
    """In a steady step, all GPUs together."""
    finish: Finish | None
    peak_process_bytes: Interval
    """On each GPU."""
    free_bytes: int
    verdict: Verdict
    energy_kwh: Interval | None
    """Of all boards; None if their power is unknown."""
    cost: Interval | None
    """None without a tariff."""
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

    Args:
        paths: configuration files.
        overrides: flags that apply to each of them.
        predicted: predicts a run.
        free_bytes_of: returns the free memory of each GPU of a prediction, in bytes.
        start: when each would start.
        world_size: GPUs that share the micro-batches of each.

    Raises:
        BadInput: for the first configuration that cannot be read or planned, naming its file.
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
        per_step = spec.tokens_per_step
        speed = step.map(lambda seconds: tokens_per_second(per_step, seconds))
    if total is not None:
        finish = Finish(
            low=time_after(start, total.low),
            expected=time_after(start, total.expected),
            high=time_after(start, total.high),
        )
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

"""Several configurations planned for the same card: what plan.py --compare says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.prediction.plan import Finish
from nanogauge.prediction.recipe import is_another_recipe, recipe_sentence
from nanogauge.prediction.search import Verdict, fit_verdict, memory_of
from nanogauge.quantities import Interval, later, tokens_per_second
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Stored


class Planned(Stored):
    """One configuration; each quantity by its best estimate, calibrated where it is."""

    config: str
    """its file"""
    name: str
    """of the run"""
    recipe: str | None
    """a sentence on it; None where it is GPT-2 by AdamW"""
    parameters: int
    """without position embeddings"""
    tokens: int
    """of the whole run"""
    tokens_per_parameter: float
    step_seconds: Interval | None
    """None, like all that follows from it, where no time is predicted on this hardware"""
    total_seconds: Interval | None
    tokens_per_second: Interval | None
    """in a steady step, of all GPUs together"""
    finish: Finish | None
    peak_process_bytes: Interval
    """on each GPU"""
    free_bytes: int
    verdict: Verdict
    """on whether it fits"""
    energy_kwh: Interval | None
    """of all boards; None where their power is not known"""
    cost: Interval | None
    """None without a tariff"""
    currency: str


def plan_all(
    paths: Sequence[Path],
    overrides: Mapping[str, Mapping[str, object]],
    predicted: Callable[[RunSpec], Prediction],
    free_bytes_of: Callable[[Prediction], int],
    start: datetime,
    world_size: int = 1,
) -> list[Planned]:
    """Plan each configuration; the shortest run first, last those of which no time is predicted.

    Args:
        paths: configuration files.
        overrides: laid over each of them.
        predicted: the prediction of one.
        free_bytes_of: returns the free memory of each GPU of a prediction, in bytes.
        start: when each would start.
        world_size: GPUs that share the micro-batches of each.

    Raises:
        BadInput: for the first that is broken or cannot be planned, naming its file.
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
            low=later(start, total.low),
            expected=later(start, total.expected),
            high=later(start, total.high),
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

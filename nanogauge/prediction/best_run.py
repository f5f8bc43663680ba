"""Search for the run with the lowest predicted loss that ends in a given time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from nanogauge.errors import BadInput
from nanogauge.prediction.loss import LossEstimate, LossInputs, predict_loss
from nanogauge.prediction.quality import USUAL_RATE_EXPONENT, loss_inputs
from nanogauge.prediction.search import IntervalEnd, Predictor, largest_micro_batch, with_micro_batch
from nanogauge.prediction.step_time import StepTime, predict_step_time
from nanogauge.prediction.workload import workload_of
from nanogauge.runspec import RunSpec, with_shape

LAYERS = (*range(6, 17), 18, 20, 22, 24, 28, 32, 36)
HEAD_WIDTH = 64
ASPECTS = (13, 80)
"""Smallest and largest ratio of width to depth."""
LEAST_TOKENS_PER_PARAMETER = 10.0
"""Smallest ratio to search; with fewer tokens the scaling law predicts too low a loss."""
LEAST_TOKENS = 1e9
MOST_PASSES = 15.0
BATCHES = (524_288, 262_144, 131_072)
"""Tokens of a step: the largest with LEAST_STEPS steps, as most published runs had."""
LEAST_STEPS = 1000
MOST_MICRO_BATCH = 64
EVALUATIONS = 16
EVIDENCE_SHAPES = ((6, 384), (12, 384), (12, 768), (16, 1024), (24, 1024), (52, 1536))
"""(layers, width) of published runs that the scaling law was fitted to."""
INDIFFERENT, ALTERNATIVE = 0.002, 0.015
"""Nats above the lowest loss within which a run counts as equally good, or as an alternative."""
RULE = 20.0
"""Tokens per parameter with the lowest loss at fixed FLOPs, by Hoffmann et al. 2022."""


def best_runs(
    spec: RunSpec, predicted: Predictor, free_bytes: float, seconds: float, sure: bool = False
) -> dict[str, RunSpec]:
    """Return the run with the lowest expected loss that ends in time, and others beside it.

    Names: "best"; "alternative 1" to 3, within 0.015 nats; "as given", the given run with the steps in time; "20 a
    parameter", the largest model of about the given aspect with as many tokens. Without "best", nothing is within the
    bounds.

    Runs below 10 tokens per parameter are excluded, as are those below 1 G tokens where others have more. Within 0.002
    of the lowest loss, the nearest to EVIDENCE_SHAPES is the best.

    Args:
        spec: data, recipe and schedule, and the shape to compare with.
        predicted: predicts a run on the device.
        free_bytes: free memory of each device.
        seconds: available time.
        sure: end in time, and fit, by the high end of the prediction instead of the expected one.

    Raises:
        BadInput: if no time is predicted on this device.
    """
    search = _Search(spec, predicted, free_bytes, seconds, "high" if sure else "expected")
    found, aspect = list(search.all()), loss_inputs(spec).aspect
    ruled = [f for f in found if f.inputs.ratio >= RULE and 0.7 < f.inputs.aspect / aspect < 1.4]
    found = [f for f in found if f.inputs.tokens >= LEAST_TOKENS] or found
    lowest = min((f.loss for f in found), default=math.inf)
    near = [f for f in found if f.loss <= lowest + ALTERNATIVE]
    near.sort(key=lambda f: (f.loss > lowest + INDIFFERENT, f.distance_from_evidence))
    near[1:4] = sorted(near[1:4], key=lambda f: f.loss)
    names = ("best", "alternative 1", "alternative 2", "alternative 3")
    runs = {name: f.spec for name, f in zip(names, near, strict=False)}
    if ruled:
        runs["20 a parameter"] = max(ruled, key=lambda f: f.inputs.parameters).spec
    timed = {name: search.exact(run, _with_steps) for name, run in runs.items()}
    given = search.exact(spec, lambda run, steps: replace(run, steps=steps))
    return timed | {"as given": given}


class _Found(NamedTuple):
    """A run that fits and ends in time, with its predicted loss on FineWeb."""

    spec: RunSpec
    inputs: LossInputs
    loss: float

    @property
    def distance_from_evidence(self) -> float:
        """Log-scale distance of layers and width from the nearest published run."""
        deep, wide = math.log(self.inputs.layers), math.log(self.inputs.width)
        return min(math.hypot(deep - math.log(n), wide - math.log(c)) for n, c in EVIDENCE_SHAPES)


class _Search:
    """Runs like a given one, in the time available.

    Step times are those of the step alone, times the given run's calibration; `exact` corrects the number of steps.
    """

    def __init__(self, like: RunSpec, predicted: Predictor, free: float, seconds: float, end: IntervalEnd) -> None:
        prediction = predicted(like)
        self._hardware, self._on_gpu = prediction.hardware, prediction.hardware.kind != "cpu"
        step, alone = prediction.best("step_seconds"), self._step(like)
        if step is None or alone is None:
            why = prediction.unpredicted["step_seconds"]
            raise BadInput(f"--best needs a predicted time: {why}.")
        self._like, self._predicted, self._free, self._end = like, predicted, free, end
        self._factor = getattr(step, end) / alone.seconds
        ledger = prediction.ledger
        self._starting = sum(ledger[part] for part in ("compile_s", "checkpoint_s", "other_s"))
        self._seconds = seconds
        self._evaluated = (like.eval_batches or 0) * like.micro_batch

    def _step(self, spec: RunSpec) -> StepTime | None:
        return predict_step_time(workload_of(spec, self._on_gpu), self._hardware)

    def all(self) -> Iterator[_Found]:
        """Yield all shapes within the bounds."""
        for layers in LAYERS:
            first, last = (math.floor(aspect * layers / HEAD_WIDTH) for aspect in ASPECTS)
            for heads in range(first + 1, last + 1):
                spec = self.timed(self._shaped(layers, heads))
                if spec is None:
                    break
                run = loss_inputs(spec)
                if run.ratio < LEAST_TOKENS_PER_PARAMETER:
                    break  # and wider ones have even fewer
                # The order of the shapes is the same on any data.
                loss = predict_loss(replace(run, dataset="FineWeb", tokenizer="gpt2", context=1024))
                if isinstance(loss, LossEstimate) and run.passes <= MOST_PASSES:
                    yield _Found(spec, run, loss.expected)

    def _shaped(self, layers: int, heads: int) -> RunSpec:
        """Return the run with another shape and the learning rate that is usual for its size."""
        sizes = {"n_head": heads, "n_kv_head": heads, "head_size": HEAD_WIDTH}
        width, like = HEAD_WIDTH * heads, self._like
        spec = with_shape(like, **sizes, n_layer=layers, n_embd=width, mlp_width=4 * width)
        schedule, muon = like.schedule, like.optimizer.matrix_learning_rate
        if schedule is None:
            return spec
        size = loss_inputs(spec).parameters / loss_inputs(like).parameters

        def scaled(rate: float) -> float:
            return float(f"{rate * size**-USUAL_RATE_EXPONENT:.2g}")

        peak, least = scaled(schedule.learning_rate), scaled(schedule.min_learning_rate)
        schedule = replace(schedule, learning_rate=peak, min_learning_rate=least, decay_steps=None)
        return replace(
            spec, schedule=schedule, optimizer=replace(like.optimizer, matrix_learning_rate=muon and scaled(muon))
        )

    def timed(self, spec: RunSpec) -> RunSpec | None:
        """Return the run with a micro-batch that fits and the steps in time; None if none is."""
        for batch in BATCHES:
            fitting = self._fitting(spec, batch // spec.shape.context)
            step = None if fitting is None else self._step(fitting)
            if fitting is None or step is None:
                return None
            evaluation = 2 * (fitting.eval_batches or 0) * step.eval_batch_seconds
            available = (self._seconds - self._starting) / self._factor
            steps = math.floor((available - (EVALUATIONS + 1) * evaluation) / step.seconds)
            if steps >= LEAST_STEPS:
                break
        return _with_steps(fitting, steps) if fitting is not None and steps > 0 else None

    def _fitting(self, spec: RunSpec, sequences: int) -> RunSpec | None:
        """Return the run at the largest micro-batch that is sure to fit, or else expected to."""
        single = replace(spec, micro_batch=1, grad_accum=sequences)
        micro = largest_micro_batch(single, self._hardware, self._free, "high")
        if micro is None and self._end == "expected":
            micro = largest_micro_batch(single, self._hardware, self._free)
        if micro is None:
            return None
        micro = min(micro, MOST_MICRO_BATCH)
        evaluated = math.ceil(self._evaluated / micro)
        return replace(with_micro_batch(single, micro), eval_batches=evaluated)

    def exact(self, spec: RunSpec, lengthen: Callable[[RunSpec, int], RunSpec]) -> RunSpec:
        """Return the run with the steps that end in time by its own prediction, at least one."""
        for attempt in range(20):
            total = getattr(self._predicted(spec).best("total_seconds"), self._end)
            if attempt > 1 and total <= self._seconds:
                break
            share = (self._seconds - self._starting) / (total - self._starting)
            spec = lengthen(spec, max(1, math.floor(spec.steps * share) - attempt))
        return spec


def _with_steps(spec: RunSpec, steps: int) -> RunSpec:
    """Return the run with these steps, evaluated and checkpointed EVALUATIONS times."""
    every = max(10, 10 * round(steps / EVALUATIONS / 10))
    schedule = spec.schedule
    if schedule is not None:
        schedule = replace(schedule, warmup_steps=min(schedule.warmup_steps, steps // 10))
    return replace(spec, steps=steps, eval_every=every, checkpoint_every=every, schedule=schedule)

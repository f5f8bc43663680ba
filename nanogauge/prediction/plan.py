"""Plan runs: whether each fits into memory, when it ends, and what would end by a deadline.

These are the records that `nanogauge plan --json` prints.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from nanogauge.config import Config, run_name
from nanogauge.errors import BadInput
from nanogauge.prediction.best_run import LEAST_TOKENS_PER_PARAMETER, best_runs
from nanogauge.prediction.loss import REPOSITORIES
from nanogauge.prediction.search import Predictor, Verdict, faster_flags, fit_verdict, largest_micro_batch, memory_of
from nanogauge.quantities import Interval, format_seconds, time_after
from nanogauge.runspec import RunSpec
from nanogauge.schema import FreeMemory, Prediction, Stored
from nanogauge.spec_parts import SETTINGS, Schedule


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
    peak_process_bytes: Interval
    """Peak memory of the process on each GPU."""
    verdict: Verdict
    step_seconds: Interval | None
    """None if no time is predicted on this hardware."""
    total_seconds: Interval | None
    val_loss: Interval | None
    """Final validation loss in nats per token; None if it is not predicted."""


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
    faster: tuple[str, float] | None
    """Flags that compute the same faster and are sure to fit, and their step over the plan's."""


class Finish(Stored):
    """Local times of the end of a run, with UTC offset; None if more than a century away."""

    low: datetime | None
    expected: datetime | None
    high: datetime | None

    @classmethod
    def after(cls, start: datetime, seconds: Interval) -> Finish:
        ends = [time_after(start, value) for value in (seconds.low, seconds.expected, seconds.high)]
        return cls(low=ends[0], expected=ends[1], high=ends[2])


class Deadline(Stored):
    start: datetime
    finish: Finish | None
    """None if no time is predicted on this hardware."""
    preparation_seconds: Interval | None
    """Time to prepare the data; None if it exists, or if its size is unknown."""
    by: datetime | None


def plan_fit(spec: RunSpec, predicted: Predictor, free: FreeMemory) -> Fit:
    """Return whether the run fits into the free memory, and the largest micro-batch that does."""
    hardware = predicted(spec).hardware
    memory = memory_of(spec, hardware)
    verdict = fit_verdict(memory.process, free.bytes)
    return Fit(
        fits=memory.process.expected <= free.bytes,
        verdict=verdict,
        certain=verdict != "doubtful",
        peak_process_bytes=memory.process.expected,
        free_bytes=free.bytes,
        free_source=free.source,
        largest_micro_batch=largest_micro_batch(spec, hardware, free.bytes),
        largest_sure_micro_batch=largest_micro_batch(spec, hardware, free.bytes, "high"),
        faster=faster_flags(spec, hardware, free.bytes),
    )


def _candidate(spec: RunSpec, plan: Prediction, free_bytes: int) -> Candidate:
    shape, memory = spec.shape, memory_of(spec, plan.hardware).process
    return Candidate(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        parameters=int(plan["parameters"].expected),
        micro_batch=spec.micro_batch,
        grad_accum=spec.grad_accum,
        max_steps=spec.steps,
        tokens=spec.tokens_per_step * spec.steps,
        peak_process_bytes=memory,
        verdict=fit_verdict(memory, free_bytes),
        step_seconds=plan.best("step_seconds"),
        total_seconds=plan.best("total_seconds"),
        val_loss=plan.best("val_loss"),
    )


class BestPlan(Stored):
    """Runs with the lowest predicted loss that end in time."""

    seconds: float
    """Available time."""
    sure: bool
    """The high end of the predicted time is in time, instead of the expected time."""
    runs: dict[str, Candidate]
    """Runs by name, as best_runs() returns them; all fit and end in time."""
    notes: list[str]
    """Caveats on the predictions of the best and the given run."""


def plan_best(
    spec: RunSpec, predicted: Predictor, free: FreeMemory, seconds: float, sure: bool
) -> tuple[BestPlan, dict[str, RunSpec]]:
    """Return the best runs as records, and their specs by the same names."""
    specs = best_runs(spec, predicted, free.bytes, seconds, sure)
    plans = {name: predicted(run) for name, run in specs.items()}
    best, notes = plans.get("best"), [f"As given: {note}" for note in plans["as given"].notes]
    if best is None:
        notes.append(
            f"no other run of {format_seconds(seconds)} is within the bounds of the loss that can "
            f"be predicted (from {LEAST_TOKENS_PER_PARAMETER:.0f} tokens a parameter, 100 M "
            "tokens, 500 steps): give more time, a faster device or more data."
        )
    elif best.best("val_loss") is None:
        why = best.unpredicted["val_loss"]
        notes.append(f"No loss is predicted, only the order of the models: {why}.")
    notes = [*best.notes, *(n for n in notes if n[10:] not in best.notes)] if best else notes
    runs = {name: _candidate(run, plans[name], free.bytes) for name, run in specs.items()}
    return BestPlan(seconds=seconds, sure=sure, runs=runs, notes=notes), specs


def best_toml(config: Config, spec: RunSpec, plan: BestPlan, device: str, path: str) -> str:
    """Return the best run's configuration for a file, with comments on prediction and keys."""
    tokens = spec.tokens_per_step * spec.steps
    spec = replace(spec, unique_tokens=spec.unique_tokens or math.ceil(tokens / 1e7) * 10**7)
    data = config.data
    source = next((path for path, known in REPOSITORIES.items() if known == data.dataset), None)
    prepare = f"prepare_fineweb.py --dataset {source} --tokens {spec.unique_tokens} "
    best = plan.runs["best"]
    hours, loss = best.total_seconds, best.val_loss
    assert hours is not None
    expects = f"{loss.expected:.3f} ({loss.low:.2f}-{loss.high:.2f})" if loss is not None else "not predicted"
    lines = [
        f"The lowest predicted loss of {format_seconds(plan.seconds)} on {device} "
        f"(nanogauge plan --best). Predicted, not measured:",
        f"{best.parameters / 1e6:.0f} M parameters on {tokens / 1e9:.2f} G tokens of "
        f"{data.dataset or data.path}, {hours.expected / 3600:.1f} h "
        f"({hours.low / 3600:.1f}-{hours.high / 3600:.1f}), "
        f"{best.peak_process_bytes.expected / 2**30:.1f} GiB,",
        f"validation loss {expects}.",
        *(f"Caveat: {note}" for note in plan.notes),
        f".venv/bin/python {prepare}--out {data.path}" if source else f"data: {data.path}",
        f".venv/bin/python train.py {shlex.quote(path)}",
    ]
    head = "".join(f"# {line}\n" for line in lines)
    settings = {key: spec.setting(key) for key in SETTINGS}
    settings |= {"data.tokens": spec.unique_tokens, "run.name": run_name(Path(path))}
    return f"{head}\n{config.with_settings(settings).to_toml(commented=True)}"


def parse_duration(text: str, flag: str) -> float:
    """Return the seconds of a duration such as 8h, 7.5h, 90min or 2d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(min|h|d)", text)
    if found is None or not float(found[1]):
        raise BadInput(f"{flag} takes a time such as 8h, 90min or 2d, not {text!r}.")
    return float(found[1]) * {"min": 60, "h": 3600, "d": 86400}[found[2]]


def plan_deadline(
    spec: RunSpec, predicted: Predictor, start: datetime, by: datetime | None, preparation: Interval | None
) -> Deadline:
    """Return when the run ends if it starts at `start`.

    `preparation` is the time to prepare the data before the run; None if there is nothing to do.
    """
    total = predicted(spec).best("total_seconds")
    finish = None if total is None else Finish.after(start, total)
    return Deadline(start=start, finish=finish, preparation_seconds=preparation, by=by)


def recipe_sentence(spec: RunSpec) -> str:
    """Return a sentence on the architecture, optimizer and learning rate of the run."""
    by = "Muon for the matrices of the blocks and AdamW for the rest" if spec.optimizer.name == "muon" else "AdamW"
    sentence = f"Recipe: {_model_words(spec)}; {by}"
    if spec.schedule is None:
        return f"{sentence}."
    return f"{sentence}; learning rate {schedule_words(spec.schedule, spec.steps)}."


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

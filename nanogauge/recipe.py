"""Describe a run in words: its model, its optimizer and its learning rate."""

from __future__ import annotations

from dataclasses import replace

from nanogauge.runspec import RunSpec, Schedule
from nanogauge.schedule import learning_rate


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
        sure: certain to end in time; 0 if not even one step is.
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

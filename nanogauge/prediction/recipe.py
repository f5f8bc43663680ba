"""What a configuration trains, in words: its model, its optimizer and its learning rate."""

from __future__ import annotations

from nanogauge.config import Config, ModelSection, OptimizerSection
from nanogauge.schedule import learning_rate


def recipe_sentence(config: Config) -> str:
    """What makes the run another than one of equal size."""
    by = "AdamW"
    if config.optimizer.name == "muon":
        by = "Muon for the matrices of the blocks and AdamW for the rest"
    rate = schedule_words(config.optimizer, config.train.max_steps)
    return f"Recipe: {_model_words(config.model)}; {by}; learning rate {rate}."


def is_another_recipe(config: Config) -> bool:
    """Whether it is more than GPT-2 by AdamW, in its model or its optimizer."""
    model = config.model.model_copy(update={"dropout": 0.0})
    return config.optimizer.name != "adamw" or _model_words(model) != "GPT-2"


def schedule_words(optimizer: OptimizerSection, max_steps: int) -> str:
    """The learning rate over a run of so many steps."""
    warmup = optimizer.warmup_steps
    words = f"{optimizer.learning_rate:g} from the first step on"
    if warmup:
        words = f"up to {optimizer.learning_rate:g} in {warmup:,} steps"
    if max_steps <= warmup:
        return f"{words}, of which there are {max_steps:,}"
    if optimizer.schedule == "constant":
        return f"{words}, level to the end"
    end = optimizer.decay_steps or max_steps
    if optimizer.schedule == "wsd":
        level = max(warmup, round((1 - optimizer.decay_share) * end))
        way = f"level to step {level:,}, straight down"
    else:
        way = "down along a cosine"
    beyond = ", after the end of the run" if end > max_steps else ""
    return f"{words}, {way} to {optimizer.min_learning_rate:g} at step {end:,}{beyond}"


def cut_sentences(config: Config, steps: int, sure: int) -> list[str]:
    """What to set for a run of so many steps, fewer than it has, and what one misses that stops.

    sure: so many end in time even where each takes as long as can be; 0 where none does.
    """
    optimizer = config.optimizer
    flags = f"--train.max-steps {steps}"
    if optimizer.decay_steps is not None and optimizer.schedule != "constant":
        flags += f" --optimizer.decay-steps {steps}"
        optimizer = optimizer.model_copy(update={"decay_steps": steps})
    words = schedule_words(optimizer, steps)
    safely = f" ({sure} to be sure)" if sure else ""
    sentences = [f"For a run of these steps: {flags}{safely}; learning rate {words}."]
    there = learning_rate(steps, config.optimizer, config.train.max_steps)
    decays = optimizer.schedule != "constant" and steps >= optimizer.warmup_steps
    if decays and there > optimizer.min_learning_rate:
        sentences.append(
            f"Stopped then without that, it would still have a learning rate of {there:.2g}, "
            f"{100 * there / optimizer.learning_rate:.0f} % of the peak."
        )
    return sentences


def _model_words(model: ModelSection) -> str:
    changes = {
        "rotary positions": model.positions == "rotary",
        "RMS norm without weights": model.norm == "rmsnorm",
        "queries and keys normed": model.qk_norm,
        "squared ReLU": model.activation == "relu2",
        "a head of its own": not model.tied_head,
        "projections zero at first": model.zero_init,
        f"logits within {model.logit_softcap:g}": model.logit_softcap > 0,
        f"dropout {model.dropout:g}": model.dropout > 0,
    }
    made = [words for words, is_so in changes.items() if is_so]
    return f"GPT-2 with {', '.join(made)}" if made else "GPT-2"

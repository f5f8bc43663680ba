"""The data of a run: opened as the configuration says, and what is to be told of it."""

from __future__ import annotations

import torch

from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.records import Event
from nanogauge.runlog import RunLog
from trainer.data.loader import Batches
from trainer.data.run_source import Source, open_source
from trainer.run.progress import Screen
from trainer.step.distributed import Ranks, share_of

ANOTHER_ORDER = 1_000_003
"""added to the seed for each time that a run went back, so that it meets its data otherwise"""


def open_data(config: Config, device: torch.device, ranks: Ranks) -> tuple[Config, Source, Batches]:
    """This rank's data, and the configuration with its number of tokens where none was given.

    Raises:
        BadInput: if there is none, if its tokenizer has more tokens than the model, or if the ranks
            cannot share the micro-batches of a step equally.
    """
    source = open_source(config.data)
    model = config.model
    if source.vocab_size is not None and source.vocab_size > model.vocab_size:
        raise BadInput(
            f"the data's tokenizer has {source.vocab_size:,} tokens but model.vocab_size is "
            f"{model.vocab_size:,}; set it to that, padded to a multiple of 64."
        )
    batches = make_batches(config, source, device, ranks)
    if config.data.tokens is None:
        data = config.data.model_copy(update={"tokens": batches.train_tokens})
        config = config.model_copy(update={"data": data})
    return config, source, batches


def make_batches(
    config: Config,
    source: Source,
    device: torch.device,
    ranks: Ranks,
    micro_batch: int | None = None,
    rollbacks: int = 0,
) -> Batches:
    """This rank's batches.

    Args:
        micro_batch: sequences in one pass, a divisor of those of a step, where memory has no room
            for those of the configuration; the same windows make a step and an evaluation.
        rollbacks: each gives another order of the training data.

    Raises:
        BadInput: as open_data, of what it finds in the source.
    """
    train, model = config.train, config.model
    micro_batch = micro_batch or train.micro_batch
    samples = train.micro_batch * train.grad_accum
    evaluated = train.micro_batch * train.eval_batches
    assert samples % micro_batch == 0
    return Batches(
        source.splits,
        micro_batch,
        model.block_size,
        model.vocab_size,
        config.run.seed + rollbacks * ANOTHER_ORDER,
        device,
        grad_accum=share_of(samples // micro_batch, ranks.world),
        order=config.data.order,
        eval_batches=-(-evaluated // micro_batch),
        rank=ranks.rank,
        world=ranks.world,
        fingerprint=source.fingerprint,
    )


def tell_of_data(
    config: Config, source: Source, batches: Batches, log: RunLog, screen: Screen
) -> None:
    """What had to be assumed of the data, what of it is never seen, and whether it has another size
    than was planned.
    """
    if source.assumed is not None:
        log.write(Event(what="data_assumed", text=source.assumed))
        screen.say(source.assumed)
    log.write(Event(what="data_order", text=describe_order(batches)))
    planned = config.data.tokens
    if planned is not None and not 0.99 < batches.train_tokens / planned < 1.01:
        text = (
            f"The data holds {batches.train_tokens:,} training tokens, not the {planned:,} of "
            "data.tokens: the passes over it are not those that were predicted."
        )
        log.write(Event(level="warning", what="data_size", text=text))
        screen.say(f"! {text}")


def describe_order(batches: Batches) -> str:
    """What an epoch is, and what of the data does not come up in it."""
    grid, block = batches.grids["train"], batches.block_size
    if batches.order == "random":
        text = f"Windows of {block:,} tokens are drawn from the training data with replacement."
    else:
        unseen = grid.unseen_tokens
        text = (
            f"An epoch predicts the {block:,} tokens of {grid.windows:,} windows, once each; "
            f"{unseen:,} of the {batches.train_tokens:,} training tokens "
            f"({unseen / batches.train_tokens:.2%}) are in none of them, others in each epoch."
        )
    if short := batches.short["train"]:
        text += f" {short:,} tokens more are in shards too short for a window, and never seen."
    return text

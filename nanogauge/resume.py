"""What may differ between a run and its resumption: nothing that changes what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.training.checkpoint import checkpoint_step, data_position, load_checkpoint
from nanogauge.training.data import Batches
from nanogauge.training.exactness import seed_rank
from nanogauge.training.ranks import Ranks

FREE_SECTIONS = ("measure", "cost", "wandb")
FREE_KEYS = ("run.name", "run.out", "train.log_every", "train.prompts")


def refuse_changes(old: Config, new: Config) -> None:
    """Compare the configuration in the run folder with the one that is asked for.

    Raises:
        BadInput: for the first key that differs and matters, with its old and new value.
    """
    before, after = old.model_dump(), new.model_dump()
    for section, values in before.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in FREE_SECTIONS or name in FREE_KEYS or value == after[section][key]:
                continue
            raise BadInput(
                f"cannot resume with another {name}: the run has {value!r}, this command "
                f"{after[section][key]!r}; use the old value, or begin a new run with --run.name."
            )


def refuse_other_data(old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Compare the position in the data that a checkpoint holds with what its step comes to now.

    Raises:
        BadInput: if the data, or the order it is seen in, is another; with old and new beside each
            other.
    """
    if old != new:
        raise BadInput(
            f"cannot resume on other data: the run was trained on {_described(old)}, this command "
            f"reads {_described(new)}; bring the old data back, or begin a new run with --run.name."
        )


def begin_state(
    checkpoint: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Batches,
    seed: int,
    ranks: Ranks,
) -> tuple[int, bool]:
    """Bring a rank to the state it begins with, its random numbers included.

    Returns the first step, and whether a run that was not disturbed would go on as this one does:
    with another number of ranks than the checkpoint's, random numbers are begun anew.

    Raises:
        BadInput: if the checkpoint is of other data.
    """
    if checkpoint is None:
        if ranks.world > 1:
            seed_rank(seed, ranks.rank, 0)
        return 0, True
    step = checkpoint_step(checkpoint)
    refuse_other_data(data_position(checkpoint), batches.position(step))
    share = ranks.rank, ranks.world
    exact = load_checkpoint(checkpoint, model, optimizer, scaler, batches.device, *share)
    if not exact:
        seed_rank(seed, ranks.rank, step)
    return step, exact


def _described(position: Mapping[str, object]) -> str:
    if not position:
        return "data that its checkpoint does not tell of"
    return (
        f"{position['train_tokens']:,} training and {position['val_tokens']:,} validation tokens "
        f"(fingerprint {str(position['fingerprint'])[:12]}, order {position['order']}, "
        f"{position['samples']:,} samples seen)"
    )

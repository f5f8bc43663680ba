"""What is trained, and what it is trained with, as a configuration has them."""

from __future__ import annotations

import torch

from model import GPT
from nanogauge.config import Config
from trainer.data.loader import Batches
from trainer.step.distributed import Ranks
from trainer.step.fsdp import ShardedLoss
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer


def make_model(config: Config) -> GPT:
    """A new model, in the host's memory."""
    model = GPT(config.model)
    model.recompute = config.train.checkpointing == "full"
    return model


def make_loss(
    config: Config, model: GPT, batches: Batches, dtype: str, ranks: Ranks
) -> TrainingLoss:
    """What a rank's micro-batches are trained on; brings the model to their device, or its part."""
    head, accumulation, device = config.train.head, batches.grad_accum, batches.device
    if config.train.sharding == "full":
        return ShardedLoss(model, head, accumulation, device, dtype)
    return TrainingLoss(model.to(device), head, accumulation, device, alone=ranks.world == 1)


def make_training(
    config: Config, model: GPT, batches: Batches, dtype: str, ranks: Ranks
) -> tuple[TrainingLoss, torch.optim.AdamW, torch.amp.GradScaler]:
    """The loss, the optimizer of what it may have sharded, the scaler in use for float16 alone."""
    loss_of = make_loss(config, model, batches, dtype, ranks)
    scaler = torch.amp.GradScaler(batches.device.type, enabled=dtype == "float16")
    return loss_of, make_optimizer(model, config.optimizer), scaler

"""AdamW in two groups: matrices and embeddings decay, norms and biases do not."""

from __future__ import annotations

import torch
from torch import nn

from nanogauge.config import OptimizerSection


def make_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW; the tied vocabulary head is one parameter and decays once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )

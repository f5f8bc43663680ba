"""AdamW in two groups: matrices and embeddings decay, norms and biases do not; and its update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def update(optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Make the update, or none where `finite` (one bool, on the device) is false.

    Nothing waits for the device: the fused optimizer takes the flag as it takes a loss scaler's.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # which looks at the gradients by itself
        scaler.update()
        return
    optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    optimizer.step()


def half_updated(optimizer: torch.optim.AdamW) -> bool:
    """Whether an update was broken off between two of its groups.

    State that an update had begun to make, and did not come to use, is dropped.
    """
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    if counts <= {0.0}:
        optimizer.state.clear()
    return len(counts) > 1

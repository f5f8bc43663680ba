"""AdamW, alone or with Muon for the matrices of the blocks.

Weight decay applies to matrices and embeddings, not to norms and biases.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanogauge.config import OptimizerSection

_RATE_SHARE = "rate_share"
"""Key of a parameter group for its learning rate as a factor of the scheduled one."""


def make_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """Return fused AdamW; if the configuration selects "muon", Muon updates the blocks' matrices.

    A tied vocabulary head is one parameter and decays once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = _matrices(model) if config.name == "muon" else []
    by_muon = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in by_muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    groups = [group for group in groups if group["params"]]
    return AdamWAndMuon(groups, matrices, config)


class AdamWAndMuon(torch.optim.AdamW):
    """AdamW that updates its last parameter group with Muon, with one state_dict for both.

    Muon updates a matrix by its orthogonalised momentum. Source: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/, as in torch.optim.Muon. Its updates are scaled to the size of AdamW's,
    so that one learning rate and weight decay serve both: Liu et al. 2025, Muon is Scalable for LLM Training,
    https://arxiv.org/abs/2502.16982, section 2.2.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: list[nn.Parameter], config: OptimizerSection) -> None:
        """groups: parameter groups for AdamW. matrices: two-dimensional parameters for Muon."""
        rate = config.learning_rate
        of_matrices = config.matrix_learning_rate or rate
        self._muon = torch.optim.Muon(
            matrices,
            lr=of_matrices,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        group = self._muon.param_groups[0] | {_RATE_SHARE: of_matrices / rate}
        super().__init__([*groups, group], lr=rate, betas=(config.beta1, config.beta2), fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters, except if self.found_inf exists and is 1."""
        assert closure is None
        *others, last = groups = self.param_groups
        for matrix in last["params"]:
            if matrix not in self.state:
                count = torch.zeros((), dtype=torch.float32, device=matrix.device)
                self.state[matrix] |= {"step": count, "momentum_buffer": torch.zeros_like(matrix)}
        self.param_groups = others
        try:
            super().step()
        finally:
            self.param_groups = groups
        found_inf = getattr(self, "found_inf", None)
        for matrix in last["params"]:
            self._muon_step(matrix, last, found_inf)

    def _muon_step(self, matrix: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update a matrix, then its step count, so that unequal counts show an interrupted update.

        torch's Muon does not support found_inf, so matrix and momentum are restored if it is 1.
        """
        state = self.state[matrix]
        changed = (matrix, state["momentum_buffer"])
        before = [tensor.clone() for tensor in changed] if found_inf is not None else []
        self._muon.state, self._muon.param_groups = self.state, [group | {"params": [matrix]}]
        self._muon.step()  # type: ignore[no-untyped-call]
        for tensor, old in zip(changed, before, strict=False):
            assert found_inf is not None
            torch.where(found_inf > 0, old, tensor, out=tensor)
        state["step"] += 1 if found_inf is None else 1 - found_inf


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the two-dimensional weights of the blocks, without embeddings and vocabulary head."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    outer = {id(table) for table in tables}
    return [
        p
        for name, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in outer and not name.endswith("lm_head.weight")
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each parameter group to `rate` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATE_SHARE, 1.0)


def update(optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Update the parameters, unless `finite` (a bool on the device) is false.

    The host does not wait for the device: the fused optimizer reads the flag there, as found_inf.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # checks the gradients itself
        scaler.update()
        return
    optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    optimizer.step()


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore moments and counts, but keep the configured learning rates and weight decays.

    torch's load_state_dict would also restore the old learning rates and weight decays, and thereby undo changes that
    the user made with --allow-change.
    """
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def is_half_updated(optimizer: torch.optim.AdamW) -> bool:
    """Return True if an update was interrupted between parameter groups or Muon's matrices.

    If the first update was interrupted before any parameter changed, clears the optimizer's state.
    """
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    if counts <= {0.0}:
        optimizer.state.clear()
    return len(counts) > 1

"""The loss that the loop trains on: the model's, less what a step need not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nanogauge.config import ModelSection, chunk_tokens
from trainer.step.chunked_cross_entropy import (
    Directly,
    LogitsMemory,
    chunked_loss,
    fusible_losses_and_slopes,
    look_up,
    losses_and_slopes,
    plain_loss,
)


class Model(Protocol):
    """What model.py has for this."""

    @property
    def config(self) -> ModelSection: ...
    @property
    def embedding(self) -> nn.Embedding: ...
    @property
    def lm_head(self) -> nn.Linear: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    def trunk(
        self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor: ...


class TrainingLoss:
    """Mean cross-entropy, in nats, of predicting targets (B T) from tokens (B T).

    With the chunked head on a CPU the gradients of the embedding and of the head, which are one
    where they are tied, are summed up in place: of a step's passes over V x C values these are the
    ones that compute nothing. Then a loss made while gradients are recorded must go through
    backward(), and as one of grad_accum equal shares of a step.
    """

    def __init__(
        self,
        model: Model,
        head: Literal["chunked", "plain"],
        grad_accum: int,
        device: torch.device,
        alone: bool = True,
    ) -> None:
        """`alone`: whether nobody else waits for gradients, as other ranks do."""
        self._model, self._head, self._device = model, head, device
        self._cap = model.config.logit_softcap
        self._memory = LogitsMemory() if device.type == "cpu" else None
        self._directly: Directly | None = None
        self._looked_up: Directly | None = None
        if head == "chunked" and device.type == "cpu" and alone:
            self._directly = self._looked_up = Directly(model.lm_head.weight, 1 / grad_accum)
            if not model.config.tied_head:
                self._looked_up = Directly(model.embedding.weight, 1 / grad_accum)
        self._trunk: Callable[[Tensor], Tensor] = model.trunk
        self._slopes_of, self._plain = losses_and_slopes, plain_loss
        self.grad_accum = grad_accum

    def compile(self) -> None:
        """Compile from the next call on.

        For a CPU a block, which is the same program in all layers and is so compiled once. For a
        GPU the trunk and the softmax. A plain head for both: its loss in fp32 is never kept then.
        """
        self.compile_head()
        if self._device.type == "cpu":
            blocks = [torch.compile(block) for block in self._model.blocks]
            self._trunk = partial(self._model.trunk, blocks=blocks)
        else:
            self._trunk = torch.compile(self._model.trunk)

    def compile_head(self) -> None:
        if self._head == "plain":
            self._plain = torch.compile(plain_loss)
        if self._device.type != "cpu":
            self._slopes_of = torch.compile(fusible_losses_and_slopes)

    def stay_eager(self) -> None:
        """Undo compile()."""
        self._trunk = self._model.trunk
        self._slopes_of, self._plain = losses_and_slopes, plain_loss

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        weight, looked_up = self._model.lm_head.weight, self._looked_up
        x = self._model.embedding(tokens) if looked_up is None else look_up(tokens, looked_up)
        hidden = self._trunk(x).flatten(0, 1)
        wanted = targets.reshape(-1)
        if self._head == "plain":
            return self._plain(hidden, weight, wanted, self._cap)
        chunk = chunk_tokens(len(wanted), len(weight), self._device.type)
        return chunked_loss(
            hidden, weight, wanted, chunk, self._directly, self._slopes_of, self._cap, self._memory
        )


class AsModule(nn.Module):
    """A loss of a model as a module with the model's parameters, for what wraps modules."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss; B T and B T."""
        return self._loss(tokens, targets)

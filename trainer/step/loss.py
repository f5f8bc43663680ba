"""Training loss: cross-entropy of the model with a chunked or plain head, compiled or eager."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from model import GPT
from nanogauge.config import chunk_tokens
from trainer.step.chunked_cross_entropy import (
    InPlaceGradient,
    LogitsMemory,
    chunked_loss,
    embed_tokens,
    fusible_losses_and_grad_logits,
    losses_and_grad_logits,
    plain_loss,
)

_TUNED: dict[str, str | int | bool | Callable[..., object]] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "coordinate_descent_tuning": True,
}
"""Triton's products can take the activation of the MLP with them, cuBLAS's cannot."""


class TrainingLoss:
    """Mean cross-entropy, in nats, of predicting targets (B T) from tokens (B T).

    The gradient of the embedding, and with the chunked head that of the head, is accumulated in place, which saves
    passes over V x C values. Each loss computed with gradients enabled must then be divided by grad_accum and used in
    backward(). Under float16 the head's is left to autograd, as the gradient scaler multiplies the loss by a factor
    that the forward pass does not know.

    Args:
        model: model to train.
        head: "chunked" or "plain" cross-entropy.
        grad_accum: micro-batches per step and rank.
        device: device of the model.
        alone: whether this is the only rank; with DDP no gradient is accumulated in place, as it needs autograd to
            produce them.
        tune: on a GPU, compile() lets Inductor measure candidates for each matrix product.
    """

    def __init__(
        self,
        model: GPT,
        head: Literal["chunked", "plain"],
        grad_accum: int,
        device: torch.device,
        alone: bool = True,
        tune: bool = False,
    ) -> None:
        self._options = _TUNED if tune and device.type == "cuda" else None
        self._model, self._head, self._device = model, head, device
        self._cap = model.config.logit_softcap
        self._memory = LogitsMemory() if device.type == "cpu" else None
        self._in_place: InPlaceGradient | None = None
        self._embedding_in_place: InPlaceGradient | None = None
        if alone and (head == "chunked" or device.type == "cuda"):
            share = 1 / grad_accum
            self._in_place = self._embedding_in_place = InPlaceGradient(model.lm_head.weight, share)
            if not model.config.tied_head:
                self._embedding_in_place = InPlaceGradient(model.embedding.weight, share)
        self._together: list[nn.Parameter] = []
        """Parameters whose gradients a compiled backward pass returns together."""
        self._trunk: Callable[[Tensor], Tensor] = model.trunk
        self._loss_kernel, self._plain = losses_and_grad_logits, plain_loss
        self.grad_accum = grad_accum

    def compile(self) -> None:
        """Use torch.compile; compilation happens in the next call.

        On a CPU the blocks are compiled, once for all layers; on a GPU all blocks together, and the softmax. A plain
        head is compiled on both, so that its fp32 log-softmax is never stored.
        """
        self.compile_head()
        if self._device.type == "cpu":
            blocks = [torch.compile(block) for block in self._model.blocks]
            self._trunk = partial(self._model.trunk, blocks=blocks)
        else:
            if self._options:
                from torch._inductor import utils

                # Inductor leaves GPUs with less than 68 SMs out, by a guess.
                utils.is_big_gpu = lambda *_: True  # type: ignore[assignment]
            self._trunk = torch.compile(self._narrow_trunk, dynamic=False, options=self._options)
            if self._embedding_in_place is not None:
                held = {id(self._model.lm_head.weight), id(self._model.embedding.weight)}
                self._together = [p for p in self._model.parameters() if id(p) not in held]

    def _narrow_trunk(self, x: Tensor) -> Tensor:
        """Return the hidden states in the precision of the head's products, without a pass more."""
        return self._model.trunk(x).to(_product_dtype(x.device.type) or x.dtype)

    def compile_head(self) -> None:
        if self._head == "plain":
            self._plain = torch.compile(plain_loss, dynamic=False)
        if self._device.type != "cpu":
            self._loss_kernel = torch.compile(fusible_losses_and_grad_logits, dynamic=False)

    def undo_compile(self) -> None:
        """Return to eager mode."""
        self._together = []
        self._trunk = self._model.trunk
        self._loss_kernel, self._plain = losses_and_grad_logits, plain_loss

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        weight, table = self._model.lm_head.weight, self._embedding_in_place
        x = self._model.embedding(tokens) if table is None else embed_tokens(tokens, table)
        hidden = self._trunk(x).flatten(0, 1)
        flat_targets = targets.reshape(-1)
        if self._head == "plain":
            return self._plain(hidden, weight, flat_targets, self._cap)
        scaled = _product_dtype(self._device.type) == torch.float16
        in_place = None if scaled else self._in_place
        chunk = chunk_tokens(len(flat_targets), len(weight), self._device.type)
        how = (chunk, in_place, self._loss_kernel, self._cap, self._memory)
        return chunked_loss(hidden, weight, flat_targets, *how)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch's loss and add them to those of earlier ones.

        Gradients that a compiled backward pass returns together are added together: by a few kernels instead of one per
        parameter.
        """
        sums = {p: p.grad for p in self._together if p.grad is not None}
        for parameter in sums:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        if sums:
            torch._foreach_add_(list(sums.values()), [p.grad for p in sums if p.grad is not None])
        for parameter, total in sums.items():
            parameter.grad = total


def _product_dtype(kind: str) -> torch.dtype | None:
    """Return autocast's precision of products on a kind of device; None without autocast."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class LossModule(nn.Module):
    """A loss function as an nn.Module with the model's parameters, so that DDP can wrap it."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of B T tokens and B T targets."""
        return self._loss(tokens, targets)

"""Compute vocabulary head and cross-entropy in chunks of tokens, without storing all logits.

The plain head stores N x V logits, their log-softmax and both gradients: 0.8 GB each for 4,096 tokens of GPT-2's
vocabulary in fp32. Here the forward pass computes each chunk's logits, turns them into softmax minus one-hot, and
multiplies that into the gradients of hidden states and weight. The result is mathematically equal to the plain head's;
its sums have a fixed order, so it is bitwise reproducible.

Shapes: N tokens, C width, V vocabulary, n tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model import softcap
from nanogauge.config import MMAP_THRESHOLD_BYTES

SMALLEST_PROBABILITY = 1e-30
"""Smallest fp32 probability that is trusted: values below 1.2e-38 are denormal and lose digits."""

LossKernel = Callable[[Tensor, Tensor, float], Tensor]


class InPlaceGradient:
    """Accumulates a weight's gradient in place, in a buffer that is reused by all steps."""

    def __init__(self, weight: Tensor, share: float) -> None:
        """share: 1 / (micro-batches per step), the gradient that backward() must be given."""
        self.weight, self.share = weight, share
        self._kept: Tensor | None = None
        self._narrow: Tensor | None = None

    def zeroed(self) -> Tensor:
        """Return weight.grad, as zeros if it holds no gradient yet."""
        total, accumulated = self.buffer()
        return total if accumulated else total.zero_()

    def narrow(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in dtype; the same copy for all micro-batches of a step."""
        if self._narrow is None or self._narrow.dtype != dtype or self.weight.grad is None:
            self._narrow = self.weight.detach().to(dtype)
        return self._narrow

    def buffer(self) -> tuple[Tensor, bool]:
        """Return weight.grad and whether it holds a gradient; if not, its values are arbitrary."""
        if self.weight.grad is not None:
            return self.weight.grad, True
        self._kept = torch.empty_like(self.weight) if self._kept is None else self._kept
        self.weight.grad = self._kept
        return self._kept, False


class LogitsMemory:
    """CPU buffer for a chunk's logits, reused if it is so large that free() would unmap it."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised rows x columns tensor."""
        if rows * columns * dtype.itemsize <= MMAP_THRESHOLD_BYTES:
            return torch.empty(rows, columns, dtype=dtype)
        kept = self._kept
        if kept is None or kept.dtype != dtype or kept.numel() < rows * columns:
            self._kept = None  # free it before allocating another
            self._kept = kept = torch.empty(rows * columns, dtype=dtype)
        return kept[: rows * columns].view(rows, columns)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats of hidden states (N C), computing all logits at once.

    cap: soft cap of the logits; 0 for none.
    """
    return F.cross_entropy(softcap(F.linear(hidden, weight), cap), targets)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    in_place: InPlaceGradient | None = None,
    loss_kernel: LossKernel | None = None,
    cap: float = 0.0,
    memory: LogitsMemory | None = None,
) -> Tensor:
    """Return the loss as plain_loss does, in chunks; the forward pass also computes the gradients.

    Args:
        hidden: N x C.
        weight: V x C.
        targets: N token ids.
        chunk: tokens of a chunk.
        in_place: adds the weight gradient to weight.grad in the forward pass, which saves a tensor of its size;
            backward() must then be called on the loss / micro-batches per step, which is checked on a CPU. None leaves
            it to autograd.
        loss_kernel: losses_and_grad_logits, or fusible_losses_and_grad_logits compiled.
        cap: soft cap of the logits; 0 for none.
        memory: buffer for the logits on a CPU; None allocates them in each call.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    loss_kernel = loss_kernel or losses_and_grad_logits
    loss: Tensor
    with torch.autocast(hidden.device.type, enabled=False):
        size = (min(chunk, len(targets)), len(weight))
        buffer = hidden.new_empty(size, dtype=dtype) if memory is None else memory.take(*size, dtype)
        if torch.is_grad_enabled():
            loss = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, targets, buffer, in_place, loss_kernel, cap
            )
            return loss
        factors = weight.to(dtype)
        chunks = zip(torch.split(hidden.to(dtype), chunk), torch.split(targets, chunk), strict=True)
        losses = [loss_kernel(_logits(buffer, part, factors), part_targets, cap) for part, part_targets in chunks]
        return torch.cat(losses).mean()


def embed_tokens(tokens: Tensor, in_place: InPlaceGradient) -> Tensor:
    """Return the embeddings (B T C) of tokens (B T); backward() adds to weight.grad in place.

    torch's embedding computes and adds a V x C gradient instead, nearly all rows of which are zero.
    """
    rows: Tensor = _Embed.apply(tokens, in_place.weight, in_place)  # type: ignore[no-untyped-call]
    return rows


def _logits(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute a chunk's logits (n V) in the buffer and return them."""
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def losses_and_grad_logits(logits: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """Return the losses (n, fp32) of a chunk and overwrite its logits (n V) by their gradient.

    The gradient is softmax minus one-hot. With a soft cap it is that of the values before the tanh: multiplied by 1 -
    tanh^2.

    A loss is the log of the sum of exponentials minus the target's logit, both minus the largest logit m, so that
    nothing overflows and no log of a probability rounded to 0 is taken. The sum is recovered from a softmax value: the
    target's or, where that is too small, the largest logit's, whose exponential is exp(m - m) = 1.
    """
    wide = logits.float()  # fp32 logits themselves
    cap_gradient = None
    if cap:
        wide.div_(cap).tanh_()
        cap_gradient = (wide * wide).neg_().add_(1)
        wide.mul_(cap)
    largest = wide.amax(-1, keepdim=True)
    of_target = wide.gather(-1, targets[:, None]) - largest
    torch.softmax(wide, -1, out=wide)
    probability = wide.gather(-1, targets[:, None])
    total = of_target.exp() / probability
    unlikely = probability < SMALLEST_PROBABILITY
    if wide.device.type != "cpu" or unlikely.any():  # on a GPU the check would synchronise
        total = torch.where(unlikely, 1 / wide.amax(-1, keepdim=True), total)
    wide.scatter_(-1, targets[:, None], probability - 1)
    if cap_gradient is not None:
        wide.mul_(cap_gradient)
    logits.copy_(wide)  # fp32 logits are `wide`
    return (total.log() - of_target).squeeze(-1)


def fusible_losses_and_grad_logits(logits: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """Compute the same as losses_and_grad_logits in a form that torch.compile fuses.

    It takes two passes without intermediates, and overwrites the logits. The target's logit is a masked sum: with
    gather(), Inductor could not make one kernel of both passes, whose second finds the row in the GPU's L2 cache.
    """
    bent = torch.tanh(logits.float() / cap) if cap else None
    wide = logits.float() if bent is None else cap * bent
    largest = wide.amax(-1, keepdim=True)
    exponentials = (wide - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    one_hot = torch.arange(wide.shape[-1], device=wide.device) == targets[:, None]
    of_target = torch.where(one_hot, wide, 0.0).sum(-1, keepdim=True) - largest
    grad_logits = exponentials / total - one_hot.float()
    logits.copy_(grad_logits if bent is None else grad_logits * (1 - bent * bent))
    return (total.log() - of_target).squeeze(-1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    """Compute beta total + alpha a b in total, whose dtype may be wider, in one pass on a GPU."""
    torch.addmm(total, a, b, beta=beta, alpha=alpha, out_dtype=total.dtype, out=total)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        buffer: Tensor,
        in_place: InPlaceGradient | None,
        loss_kernel: LossKernel,
        cap: float,
    ) -> Tensor:
        chunk, dtype = len(buffer), buffer.dtype
        scale = 1 / len(targets)
        # cuBLAS adds products of 16-bit factors to an fp32 matrix, without a pass of its own.
        on_gpu = hidden.device.type == "cuda" and dtype != weight.dtype
        factors = in_place.narrow(dtype) if on_gpu and in_place else weight.to(dtype)
        narrow, grad_hidden = hidden.to(dtype), torch.empty_like(hidden)
        if in_place is None:
            grad_weight, accumulated = torch.empty_like(weight), False
        else:
            grad_weight, accumulated = in_place.buffer()
            scale *= in_place.share
        # A CPU copies what it adds to fp32: add a part that its caches hold, not the whole weight.
        rows_at_once = 8192 if hidden.device.type == "cpu" else len(weight)
        losses = []
        for part, part_targets, result in zip(
            torch.split(narrow, chunk), torch.split(targets, chunk), torch.split(grad_hidden, chunk), strict=True
        ):
            grad_logits = _logits(buffer, part, factors)
            losses.append(loss_kernel(grad_logits, part_targets, cap))
            if on_gpu:
                _add_product(grad_weight, grad_logits.t(), part, int(accumulated), scale)
                _add_product(result, grad_logits, factors, 0, scale)
            elif dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.t(), part, beta=int(accumulated), alpha=scale)
                torch.mm(grad_logits, factors, out=result)
            else:  # 16-bit products, accumulated over the chunks in fp32
                if not accumulated:
                    grad_weight.zero_()
                for rows, columns in zip(
                    torch.split(grad_weight, rows_at_once), torch.split(grad_logits, rows_at_once, dim=1), strict=True
                ):
                    rows.add_(torch.mm(columns.t(), part), alpha=scale)
                result.copy_(torch.mm(grad_logits, factors))
            accumulated = True
        ctx.grad_hidden = grad_hidden if on_gpu else grad_hidden.mul_(scale)
        ctx.grad_weight = grad_weight if in_place is None else None
        ctx.share = None if in_place is None else in_place.share
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        none = (None, None, None, None, None)
        if ctx.share is None:
            grad_weight, ctx.grad_weight = ctx.grad_weight, None  # may become weight.grad itself
            return ctx.grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), *none
        if grad_output.device.type == "cuda":  # reading it would wait for the GPU
            return ctx.grad_hidden, None, *none
        agreed = abs(grad_output.item() - ctx.share) <= 1e-6 * ctx.share
        assert agreed, f"backward() was called with {grad_output.item()}, not with {ctx.share}"
        return ctx.grad_hidden, None, *none


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, in_place: InPlaceGradient) -> Tensor:
        ctx.tokens, ctx.in_place = tokens, in_place
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        ctx.in_place.zeroed().index_add_(0, ctx.tokens.reshape(-1), rows)
        return None, None, None

"""The vocabulary head and its cross-entropy, a few tokens at a time, so that no logits are kept.

The plain form makes N x V logits, their log-softmax and both gradients: 0.8 GB each at 4,096 tokens
of GPT-2's vocabulary in fp32, and nothing of it outlives the loss. Here a chunk of tokens goes
through all three products at once, in the forward pass: logits, then from softmax less one-hot the
gradients of the hidden states and of the weight. Mathematically nothing is left out, and the order
of the sums is fixed: the same bits each time.

Shapes: N tokens, C width, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model import softcap
from nanogauge.config import MMAP_THRESHOLD_BYTES

SMALLEST_TRUSTED = 1e-30
"""probability in fp32 whose digits are all there: those below 1.2e-38 lose some"""

SlopesOf = Callable[[Tensor, Tensor, float], Tensor]


class Directly:
    """The gradient of a weight that is summed up in place, in memory that is kept between steps."""

    def __init__(self, weight: Tensor, share: float) -> None:
        """share: of a step's gradient that one loss is, and what its backward() is called with."""
        self.weight, self.share = weight, share
        self._kept: Tensor | None = None

    def sum(self) -> Tensor:
        """weight.grad; zeros where zero_grad() has taken it away."""
        total, begun = self.sum_so_far()
        return total if begun else total.zero_()

    def sum_so_far(self) -> tuple[Tensor, bool]:
        """weight.grad, and whether it holds anything yet; if not, it is to be overwritten."""
        if self.weight.grad is not None:
            return self.weight.grad, True
        self._kept = torch.empty_like(self.weight) if self._kept is None else self._kept
        self.weight.grad = self._kept
        return self._kept, False


class LogitsMemory:
    """Memory for the logits of a chunk on a CPU, kept between losses if glibc would not keep it."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """rows x columns of no particular values."""
        if rows * columns * dtype.itemsize <= MMAP_THRESHOLD_BYTES:
            return torch.empty(rows, columns, dtype=dtype)
        kept = self._kept
        if kept is None or kept.dtype != dtype or kept.numel() < rows * columns:
            self._kept = None  # before there is another
            self._kept = kept = torch.empty(rows * columns, dtype=dtype)
        return kept[: rows * columns].view(rows, columns)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of hidden states (N C) against targets (N), all logits at once.

    cap: what a tanh keeps the logits within; 0 leaves them alone.
    """
    return F.cross_entropy(softcap(F.linear(hidden, weight), cap), targets)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    directly: Directly | None = None,
    slopes_of: SlopesOf | None = None,
    cap: float = 0.0,
    memory: LogitsMemory | None = None,
) -> Tensor:
    """The same as plain_loss from chunks of tokens; gradients are computed with the loss.

    Args:
        hidden: N x C.
        weight: V x C.
        targets: N token ids.
        chunk: tokens of a chunk.
        directly: where the weight's gradient is added at once, which spares a tensor of its size
            and a pass over it; a loss that is made like this must go through backward(). None
            leaves that to autograd.
        slopes_of: losses_and_slopes, or that function compiled as fusible_losses_and_slopes.
        cap: what a tanh keeps the logits within; 0 leaves them alone.
        memory: on a CPU, where the logits lie; None makes a tensor for them.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    slopes_of = slopes_of or losses_and_slopes
    loss: Tensor
    with torch.autocast(hidden.device.type, enabled=False):
        size = (min(chunk, len(targets)), len(weight))
        if memory is None:
            buffer = hidden.new_empty(size, dtype=dtype)
        else:
            buffer = memory.take(*size, dtype)
        if torch.is_grad_enabled():
            loss = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, targets, buffer, directly, slopes_of, cap
            )
            return loss
        factors = weight.to(dtype)
        chunks = zip(torch.split(hidden.to(dtype), chunk), torch.split(targets, chunk), strict=True)
        losses = [slopes_of(_logits(buffer, part, factors), wanted, cap) for part, wanted in chunks]
        return torch.cat(losses).mean()


def look_up(tokens: Tensor, directly: Directly) -> Tensor:
    """Rows of the weight (V x C) for tokens (B T); their gradient is added to its rows at once.

    The plain embedding makes a gradient of all V rows, nearly all of them zero, and adds that.
    """
    rows: Tensor = _LookUp.apply(tokens, directly.weight, directly)  # type: ignore[no-untyped-call]
    return rows


def _logits(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """n x V, in the buffer."""
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def losses_and_slopes(logits: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """Losses (n) in fp32; the logits (n V) are overwritten by their slopes: softmax less one-hot.

    Where a tanh keeps them within cap, the slopes are those of what goes into the tanh: they are
    multiplied by 1 - tanh^2.

    A loss is the log of the sum of exponentials less the target's logit, both less the largest
    logit m, so that nothing overflows and no probability that rounds to 0 is taken the log of. The
    sum is what a token's exponential was divided by: the target's, or where that may have lost
    digits the most likely one's, which is exp(m - m).
    """
    wide = logits.float()  # fp32 logits themselves
    slope = None
    if cap:
        wide.div_(cap).tanh_()
        slope = (wide * wide).neg_().add_(1)
        wide.mul_(cap)
    largest = wide.amax(-1, keepdim=True)
    of_target = wide.gather(-1, targets[:, None]) - largest
    torch.softmax(wide, -1, out=wide)
    probability = wide.gather(-1, targets[:, None])
    total = of_target.exp() / probability
    unlikely = probability < SMALLEST_TRUSTED
    if wide.device.type != "cpu" or unlikely.any():  # on a GPU to ask would be to wait
        total = torch.where(unlikely, 1 / wide.amax(-1, keepdim=True), total)
    wide.scatter_(-1, targets[:, None], probability - 1)
    if slope is not None:
        wide.mul_(slope)
    logits.copy_(wide)  # fp32 logits are `wide`
    return (total.log() - of_target).squeeze(-1)


def fusible_losses_and_slopes(logits: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """The same for a compiler, which makes two passes of it and keeps nothing in between."""
    bent = torch.tanh(logits.float() / cap) if cap else None
    wide = logits.float() if bent is None else cap * bent
    largest = wide.amax(-1, keepdim=True)
    exponentials = (wide - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    of_target = wide.gather(-1, targets[:, None]) - largest
    one_hot = torch.arange(wide.shape[-1], device=wide.device) == targets[:, None]
    slopes = exponentials / total - one_hot.float()
    logits.copy_(slopes if bent is None else slopes * (1 - bent * bent))
    return (total.log() - of_target).squeeze(-1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        buffer: Tensor,
        directly: Directly | None,
        slopes_of: SlopesOf,
        cap: float,
    ) -> Tensor:
        chunk, dtype = len(buffer), buffer.dtype
        each = 1 / len(targets)
        factors, narrow = weight.to(dtype), hidden.to(dtype)
        by_hidden = torch.empty_like(hidden)
        if directly is None:
            by_weight, begun = torch.empty_like(weight), False
        else:
            by_weight, begun = directly.sum_so_far()
            each *= directly.share
        # A CPU copies what it adds to fp32: a piece that its caches hold, not all of the weight.
        rows_at_once = 8192 if hidden.device.type == "cpu" else len(weight)
        losses = []
        for part, wanted, result in zip(
            torch.split(narrow, chunk),
            torch.split(targets, chunk),
            torch.split(by_hidden, chunk),
            strict=True,
        ):
            slopes = _logits(buffer, part, factors)
            losses.append(slopes_of(slopes, wanted, cap))
            if dtype == weight.dtype:
                by_weight.addmm_(slopes.t(), part, beta=int(begun), alpha=each)
                torch.mm(slopes, factors, out=result)
            else:  # 16-bit products, summed up over the chunks in fp32
                if not begun:
                    by_weight.zero_()
                for rows, some in zip(
                    torch.split(by_weight, rows_at_once),
                    torch.split(slopes, rows_at_once, dim=1),
                    strict=True,
                ):
                    rows.add_(torch.mm(some.t(), part), alpha=each)
                result.copy_(torch.mm(slopes, factors))
            begun = True
        ctx.by_hidden = by_hidden.mul_(each)
        ctx.by_weight = by_weight if directly is None else None
        ctx.share = None if directly is None else directly.share
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        none = (None, None, None, None, None)
        if ctx.share is None:
            by_weight, ctx.by_weight = ctx.by_weight, None  # becomes weight.grad, if it may
            return ctx.by_hidden.mul_(slope), by_weight.mul_(slope), *none
        agreed = abs(slope.item() - ctx.share) <= 1e-6 * ctx.share
        assert agreed, f"backward() was called with {slope.item()}, not with {ctx.share}"
        return ctx.by_hidden, None, *none


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, directly: Directly) -> Tensor:
        ctx.tokens, ctx.directly = tokens, directly
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[None, None, None]:
        rows = slope.reshape(-1, slope.shape[-1])
        ctx.directly.sum().index_add_(0, ctx.tokens.reshape(-1), rows)
        return None, None, None

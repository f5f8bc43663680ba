"""What the options of model.py beyond GPT-2 add to a step: bytes that are moved, and kernels.

Counted, not fitted: eager operation by operation below autograd, compiled in what inductor's
scheduler makes of the graphs on a CPU. On a GPU, where nothing has been counted, the same rules
with its fused kernel of the norm, and without the copies that a CPU's attention asks for.
docs/prediction.md has the derivation. Zero for GPT-2, all of whose traffic is in constants.py.

Symbols: C width, F width of the MLP, V vocabulary, Q and K widths of all queries and of all keys, e
bytes of an activation, r bytes of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.predict.workload import Workload

MUON_BYTES = 94.0
"""per fp32 weight of Muon in train.py, one matrix after another: momentum and Nesterov's step 24,
to 16 bits 6, to a norm of one 6, decay and update 18; copies of weight and momentum 16, and the
choice between these and what became of them 24"""

MUON_KERNELS = 31
"""per matrix: 15 products of five iterations, and the operations above"""


@dataclass(frozen=True)
class Extra:
    """Forward and backward pass together."""

    bytes: float = 0.0
    """per token, of one layer or of the head"""
    kernels: float = 0.0
    """of one layer"""

    def __add__(self, other: Extra) -> Extra:
        return Extra(self.bytes + other.bytes, self.kernels + other.kernels)


def is_beyond_gpt2(work: Workload) -> bool:
    """Whether a step has anything in it that is counted here."""
    options = bool(work.program.logit_softcap) or of_layer(work, on_cpu=False) != Extra()
    return options or (work.optimizer == "muon" and work.program.muon_restored)


def of_layer(work: Workload, on_cpu: bool) -> Extra:
    """Beyond a layer of GPT-2; below zero where an option spares more than it costs."""
    extra = _queries_and_keys(work, on_cpu)
    if not work.shape.norm_weights:
        extra += _norms_without_weights(work, on_cpu)
    if work.program.squared_relu and not work.compiled:
        # ReLU and a square are two passes where GELU is one, and the gradient of a square, which is
        # taken for a power, makes three more: 2 + 7 reads and writes.
        extra += Extra(9 * work.element_bytes * work.shape.mlp_width, 4)
    return extra


def _queries_and_keys(work: Workload, on_cpu: bool) -> Extra:
    """Of rotary positions and of the norm of queries and keys."""
    rotated, normed = not work.shape.position_table, work.program.qk_norm
    values, e = work.shape.query_width + work.shape.key_width, work.element_bytes
    if work.compiled:
        # A pass over them forward; the gradient's rotation is part of a pass that GPT-2 has too.
        # The norm reads them once more, and backward slopes and values; the rotation goes along.
        moved, kernels = (6.0, 3) if normed else (2.0 * rotated, 1 * rotated)
        if on_cpu and (rotated or normed):  # whose attention wants copies in another order
            moved, kernels = moved + 2.75, kernels + 6
        return Extra(moved * e * values, kernels)
    extra = Extra()
    if normed and on_cpu:  # operation by operation in fp32, and casts to and from it
        casts = 22 if e == 2 else 0
        extra += Extra((25 * 4 + casts) * values, 35 + 8 * (e == 2))
    elif normed:  # one fused kernel forward and one backward, in fp32 under autocast too
        casts = 24 if e == 2 else 0
        extra += Extra((5 * 4 + casts) * values, 4 + 8 * (e == 2))
    if rotated:
        # Of both halves four products, a sum, a difference, and putting them together: 9 reads and
        # writes of a value; backward 10; on a CPU 3 more to bring them into attention's order.
        wide = 4 if normed and not on_cpu else e  # what the norm made under autocast stays fp32
        extra += Extra((22 if on_cpu else 19) * wide * values, 33 if on_cpu else 30)
    return extra


def _norms_without_weights(work: Workload, on_cpu: bool) -> Extra:
    """Of the two RMS norms of a layer, in the place of LayerNorms with weights."""
    width = work.shape.n_embd
    r = 4 if work.program.wide_residual and work.program.master_weights else work.element_bytes
    if on_cpu and not work.compiled:
        # LayerNorm is a kernel of 2 reads and writes forward and 3 backward; this is 16 operations,
        # in fp32, of which each goes through memory: 22.
        return Extra(2 * 17 * 4 * width, 28)
    # The gradient of a weight is a pass of its own over slopes and normalised values.
    slopes = work.element_bytes if work.compiled else r
    return Extra(-2 * (slopes + r) * width)


def of_logits(work: Workload, on_cpu: bool) -> float:
    """Bytes a token adds where a tanh caps its logits, beyond the loss without it."""
    if not work.program.logit_softcap:
        return 0.0
    if work.head == "chunked":
        # training/head.py, in fp32: seven operations in place and the product of two slopes. The
        # compiler makes them part of passes that are there without; a CPU's head is not compiled.
        fused = work.compiled and not on_cpu
        return 0.0 if fused else 15 * 4.0 * work.shape.vocabulary
    fused = work.compiled and work.program.compiled_loss
    # Quotient, tanh and product: 6 reads and writes forward, 7 backward.
    return 0.0 if fused else 13.0 * work.element_bytes * work.shape.vocabulary

"""Predict activation memory: tensors saved for the backward pass, logits and loss, in bytes.

The formulas come from counts: in eager mode with torch's saved-tensor hooks, compiled in the graphs that AOTAutograd's
partitioner passes to Inductor. Tests compare them with both counts.

Symbols: C width, F width of the MLP, H heads, Q and K widths of all queries and of all keys, T context, V vocabulary, e
bytes of an activation, r bytes of the residual stream.
"""

from dataclasses import dataclass

from nanogauge.config import MMAP_THRESHOLD_BYTES, chunk_tokens
from nanogauge.prediction.workload import Workload


@dataclass(frozen=True)
class Saved:
    """Activation bytes of one micro-batch."""

    layer: float
    """saved by one layer for its backward pass, without activation checkpointing"""
    kept: float
    """kept by one layer from its forward to its backward pass; below `layer` with checkpointing"""
    edges: float
    """saved before the first and after the last layer, without the logits"""
    final_norm: float
    """part of `edges` that the final norm saves; freed after its backward pass"""
    logits_forward: float
    """logits and loss tensors at the end of the forward pass; with a chunked head, the tensors of one chunk, and its
    weight gradient if that is a separate tensor"""
    logits_backward: float
    """logits and loss tensors while the gradient of the loss is computed"""
    logits_kept: float
    """part of the logits and loss tensors that stays allocated for the rest of the step"""
    layer_gradients: float
    """gradients during the backward pass of the last matrix product of a layer's MLP, beyond what the layer had
    saved"""


def saved_for_backward(work: Workload, on_cpu: bool = False) -> Saved:
    """Return the bytes saved for the backward pass of one micro-batch on one device."""
    shape, program, n = work.shape, work.program, work.tokens
    e = work.element_bytes
    r = 4 if work.program.wide_residual and work.program.master_weights else e
    width, mlp = shape.n_embd, shape.mlp_width
    # fp32: 1/deviation, and of an eager LayerNorm the mean too
    statistics = 4 if work.compiled or not shape.norm_weights else 8

    # Norms keep their fp32 input (compiled: the normalised one), the products their 16-bit input.
    norms = 2 * (r * width + statistics) + 2 * e * width
    hidden = mlp if shape.mlp_matrices == 2 else (2 if work.compiled else 3) * mlp
    activation = e * (hidden + mlp)  # of a gated MLP also silu(gate), which compiled is recomputed
    if program.squared_relu and not (work.compiled or on_cpu) and e == 2:
        activation += 4 * mlp  # a GPU squares in fp32
    scales = program.learned_scales * e * width
    masks = 2 * _mask_bytes(work, on_cpu, e) * width
    layer = norms + _attention(work, on_cpu) + activation + scales + masks
    kept: float = layer
    queries, keys = shape.query_width, shape.key_width
    if work.checkpointing == "full":
        kept = r * width
    elif work.checkpointing == "selective":
        # torchtitan's: attention's output and every second product are kept (its
        # torchtitan/parallelisms/parallelize_llama.py); q, v, the first and last of the MLP.
        last = width if shape.mlp_matrices == 3 else 0
        kept = r * width + e * (2 * queries + keys + mlp + last) + 4 * shape.n_head

    # The head keeps its input; a chunked one the gradient of that.
    chunked = work.head == "chunked"
    final_norm = r * width + statistics + (_hidden_bytes(work, on_cpu) if chunked else e) * width
    token_ids = 8 if work.compiled or chunked else 16  # int64; eager copies the targets
    edges = final_norm + token_ids + _mask_bytes(work, on_cpu, r) * width
    forward, backward = (n * each for each in _logits(work, on_cpu))
    logits_kept = 0.0
    if chunked:
        logits = _chunk_logits(work, on_cpu)
        logits_kept = logits if on_cpu and logits > MMAP_THRESHOLD_BYTES else 0.0
        forward, backward = _chunk(work, on_cpu), logits_kept
    # Eager, the square's gradient makes two tensors on its way to what GELU's makes at once; the weight's is gone by
    # then where it was added to an earlier micro-batch's.
    inner = e * width * mlp
    if program.squared_relu and not work.compiled:
        square = 2 * n * e * mlp
        inner = max(inner, square) if work.grad_accum > 1 else inner + square
    return Saved(
        layer=n * layer,
        kept=n * kept,
        edges=n * edges,
        final_norm=n * final_norm,
        logits_forward=forward,
        logits_backward=backward,
        logits_kept=logits_kept,
        layer_gradients=n * (r * width + (e * width if e < r else 0) + e * mlp) + inner,
    )


def _mask_bytes(work: Workload, on_cpu: bool, element: int) -> int:
    """Return the bytes per element of a dropout mask: 1, or `element` in eager mode on a CPU."""
    if not work.dropout:
        return 0
    return element if on_cpu and not work.compiled else 1


def _attention(work: Workload, on_cpu: bool) -> float:
    """Return the bytes per token of a layer's attention, from the QKV projections to its output."""
    shape, e = work.shape, work.element_bytes
    half = e == 2
    queries, keys = shape.query_width, shape.key_width
    scores = shape.n_head * shape.context
    # Queries, keys and values, and the output, which the projection after it shares.
    inputs, output = queries + 2 * keys, queries
    extra = _changed_queries_and_keys(work, on_cpu)
    if on_cpu and work.dropout:  # its fused kernel has no dropout: plain attention, in fp32
        if not work.compiled:
            return extra + 12 * scores + 4 * inputs + e * output
        return extra + (5 if half else 9) * scores + e * (inputs + output)
    if work.attention == "plain":
        # Scores before and after softmax, as far as they are kept: in fp32 one tensor; in 16 bits the fp32 result and
        # its 16-bit cast, compiled both in 16 bits. Dropout: mask and product.
        kept = (4 if work.compiled else 6) if half else 4
        if work.dropout:
            kept += 1 if half else 5
        return extra + kept * scores + e * (inputs + output)
    return extra + e * (inputs + output) + 4 * shape.n_head  # logsumexp in fp32


def _changed_queries_and_keys(work: Workload, on_cpu: bool) -> float:
    """Return the bytes per token that normalized or rotated queries and keys add in one layer.

    If one matrix computes queries, keys and values, the values are a view of its output, which therefore stays
    allocated beside the new tensors. What the norm saves is then a view of it too.
    """
    shape, program, e = work.shape, work.program, work.element_bytes
    rotated = not shape.position_table
    if not (rotated or program.qk_norm):
        return 0.0
    changed = shape.query_width + shape.key_width
    statistics = 4 * (shape.n_head + shape.n_kv_head) * program.qk_norm
    if not program.fused_qkv:
        return e * changed * program.qk_norm
    if work.compiled and on_cpu:
        # The partitioner keeps a copy of the output, which a CPU's kernel puts in another order; rotated, also the
        # projection's output in the place of the residual stream after it.
        r = 4 if work.program.wide_residual and work.program.master_weights else e
        copies = (2 * e - r if rotated else e) * shape.query_width
        if work.dropout:  # plain attention: no copy, and 16-bit keys normed alone are made again
            copies = 0 if rotated or e == 4 else -e * changed * program.qk_norm
        return (e * changed + statistics) * program.qk_norm + copies
    # The output lies in another order, so that the projection has a copy. Eager, the norm of 16-bit values keeps them
    # in fp32, and the tables are cast for each of queries and keys.
    narrow = e == 2 and not work.compiled
    wide = 4 * changed * program.qk_norm if narrow else 0
    tables = 2 * e * shape.head_size / work.micro_batch if rotated and narrow else 0
    if work.dropout and on_cpu:  # plain attention copies what it takes, and the product goes
        product = e * (changed + shape.key_width) * program.qk_norm if e == 4 else 0
        return product + wide + statistics + tables
    return e * (changed + shape.query_width) + wide + statistics + tables


def _chunk_logits(work: Workload, on_cpu: bool) -> float:
    vocabulary = work.shape.vocabulary
    tokens = chunk_tokens(work.tokens, vocabulary, "cpu" if on_cpu else "cuda")
    return work.element_bytes * vocabulary * min(work.tokens, tokens)


def _hidden_bytes(work: Workload, on_cpu: bool) -> int:
    """Return the bytes of a final hidden state: in 16 bits if train.py compiles its cast too."""
    narrow = work.compiled and not on_cpu and work.shards == 1
    wide = work.program.wide_residual and work.program.master_weights and not narrow
    return 4 if wide else work.element_bytes


def _chunk(work: Workload, on_cpu: bool) -> float:
    """Return the peak bytes within the chunked head's forward pass, beyond what it keeps.

    If the weight gradient does not accumulate in place, it is a separate tensor.
    """
    vocabulary, width, e = work.shape.vocabulary, work.shape.n_embd, work.element_bytes
    logits = _chunk_logits(work, on_cpu)
    chunk = logits / (e * vocabulary)
    weight = 0.0 if work.in_place else 4.0 * vocabulary * width
    hidden = _hidden_bytes(work, on_cpu)
    inputs = (hidden + (e if e < hidden else 0)) * width * work.tokens
    # Soft-capped logits have the slope of their tanh beside them, while the softmax is made: in fp32, and gone when
    # products begin.
    softmax = 4.0 * vocabulary * chunk * (bool(work.program.logit_softcap) + (e == 2))
    if on_cpu and e == 2:  # which cannot add 16 bits to 32 without a copy
        product = max(6.0 * vocabulary * width, softmax)
    elif on_cpu or not work.compiled:
        product = softmax
    else:
        product = 0.0
    return logits + weight + product + inputs


def _logits(work: Workload, on_cpu: bool) -> tuple[float, float]:
    """Return the bytes per token of logits and loss: after the forward pass, and in the backward pass.

    Eager: the logits are there until forward returns, with the log-softmax and an fp32 copy of either; the backward
    pass has the log-softmax, its gradient and the gradient of its input, all in fp32. Autocast on a GPU takes the
    log-softmax in 16 bits; then that, its fp32 copy and the gradient of the copy are there. Compiled: only the logits;
    their gradient is written over them where they may be. If forward returns them too, autograd allocates zeros of
    their size as the gradient of that output.
    """
    vocabulary, program, e = work.shape.vocabulary, work.program, work.element_bytes
    if work.compiled and program.compiled_loss:
        in_place = program.donated_buffers and not program.logits_kept
        tensors = 3 if program.logits_kept else 1 if in_place else 2
        return e * vocabulary, tensors * e * vocabulary
    capped = e if program.logit_softcap else 0  # tanh keeps its result
    narrow = e == 2 and not (on_cpu or program.logits_widened)
    forward = e + (6 if narrow else 8 if e == 2 else 4)
    backward = (10 if narrow else 12) + (e if program.logits_kept else 0)
    return (forward + capped) * vocabulary, (backward + capped) * vocabulary

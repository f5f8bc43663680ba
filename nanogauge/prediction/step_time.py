"""Predict the time of one optimizer step: the sum of a roofline for each kind of operation.

n is the tokens of a micro-batch, C the width, L the layers, T the context, V the vocabulary, F the width of the MLP, P
the parameters. The ceiling of the matrix products is a published
measurement on such a GPU, or the clock that its power sustains. Constants and their sources: constants.py; their
errors: docs/prediction.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanogauge.config import chunk_tokens
from nanogauge.prediction.constants import (
    FITTED,
    POWER_EXPONENT,
    RATE_EXPONENT,
    SETUP_SPREAD,
    STATIC_SHARE,
    Constants,
    DeviceClass,
    Effect,
    effect_class,
)
from nanogauge.prediction.flops import count_parameters, layer_matrices
from nanogauge.prediction.workload import FORMULAS, GPUS_OF_A_NODE, Workload
from nanogauge.quantities import Interval
from nanogauge.schema import Hardware, Part

MUON_BYTES = 94.0
"""bytes per fp32 weight moved by Muon in train.py, one matrix at a time: momentum and Nesterov step 24, cast to 16 bits
6, normalization 6, decay and update 18; copies of weight and momentum 16, and the choice between copies and results
24"""

MUON_KERNELS = 31
"""kernels per matrix: 15 products in five Newton-Schulz iterations, and those of MUON_BYTES"""


@dataclass(frozen=True)
class Extra:
    """Additional work of a forward and backward pass compared with GPT-2."""

    bytes: float = 0.0
    """memory traffic per token, of one layer or of the head"""
    kernels: float = 0.0
    """kernel launches of one layer"""

    def __add__(self, other: Extra) -> Extra:
        return Extra(self.bytes + other.bytes, self.kernels + other.kernels)


def is_beyond_gpt2(work: Workload) -> bool:
    """Return True if a step contains work that GPT-2's does not."""
    options = bool(work.program.logit_softcap) or of_layer(work, on_cpu=False) != Extra()
    return options or (work.optimizer == "muon" and work.program.muon_restored)


def of_layer(work: Workload, on_cpu: bool) -> Extra:
    """Return a layer's work beyond GPT-2's; negative where an option saves more than it adds."""
    extra = _queries_and_keys(work, on_cpu)
    if not work.shape.norm_weights:
        extra += _norms_without_weights(work, on_cpu)
    # The gradient of a learned scale is a sum over tokens of what it scales times its gradient.
    scaled = 3 * work.element_bytes * work.shape.n_embd
    extra += Extra(scaled * work.program.learned_scales, 2 * work.program.learned_scales)
    if work.program.squared_relu and not work.compiled:
        # ReLU and a square are two passes where GELU is one, and the gradient of a square, which is taken for a power,
        # makes three more: 2 + 7 reads and writes.
        extra += Extra(9 * work.element_bytes * work.shape.mlp_width, 4)
    return extra


def _queries_and_keys(work: Workload, on_cpu: bool) -> Extra:
    """Return the additional work of rotary positions and of normalized queries and keys."""
    rotated, normed = not work.shape.position_table, work.program.qk_norm
    values, e = work.shape.query_width + work.shape.key_width, work.element_bytes
    if work.compiled:
        # A pass over them forward; the gradient's rotation is part of a pass that GPT-2 has too. The norm reads them
        # once more, and backward slopes and values; the rotation goes along.
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
        # Of both halves four products, a sum, a difference, and putting them together: 9 reads and writes of a value;
        # backward 10; on a CPU 3 more to bring them into attention's order.
        wide = 4 if normed and not on_cpu else e  # what the norm made under autocast stays fp32
        extra += Extra((22 if on_cpu else 19) * wide * values, 33 if on_cpu else 30)
    return extra


def _norms_without_weights(work: Workload, on_cpu: bool) -> Extra:
    """Return the work of a layer's two RMSNorms less that of LayerNorms with weights."""
    width = work.shape.n_embd
    r = 4 if work.program.wide_residual and work.program.master_weights else work.element_bytes
    if on_cpu and not work.compiled:
        # LayerNorm is a kernel of 2 reads and writes forward and 3 backward; this is 16 operations, in fp32, of which
        # each goes through memory: 22.
        return Extra(2 * 17 * 4 * width, 28)
    # The gradient of a weight is a pass of its own over slopes and normalised values.
    slopes = work.element_bytes if work.compiled else r
    return Extra(-2 * (slopes + r) * width)


def of_logits(work: Workload, on_cpu: bool) -> float:
    """Return the additional bytes per token if the logits are soft-capped by tanh."""
    if not work.program.logit_softcap:
        return 0.0
    if work.head == "chunked":
        # trainer/step/chunked_cross_entropy.py, in fp32: seven operations in place and the product of two gradients.
        # The compiler fuses them into existing passes; a CPU's head is eager.
        fused = work.compiled and not on_cpu
        return 0.0 if fused else 15 * 4.0 * work.shape.vocabulary
    fused = work.compiled and work.program.compiled_loss
    # Quotient, tanh and product: 6 reads and writes forward, 7 backward.
    return 0.0 if fused else 13.0 * work.element_bytes * work.shape.vocabulary


ARITHMETIC = ("matrix products of the blocks", "attention", "vocabulary head", "recomputation", "matrix products")
"""parts of a step that scale with the clock of the matrix units; the others are memory-bound"""
EAGER_SPREAD = 0.08
"""Standard deviation of the log of the step time that eager execution adds."""


@dataclass(frozen=True)
class StepTime:
    parts: list[Part]
    """seconds of one optimizer step by kind of operation"""
    eval_batch_seconds: float
    """seconds of one micro-batch's forward pass"""
    factor: Interval
    """interval of the step time, as a factor of the expected one"""
    caveats: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Expected time of a step."""
        return sum(part.value for part in self.parts)

    @property
    def interval(self) -> Interval:
        """Time of a step in seconds."""
        return self.factor * self.seconds


@dataclass(frozen=True)
class DeviceRates:
    """Performance of a device in a workload; bandwidth in B/s."""

    ceiling: float
    attention: float
    """Rate of the products inside flash attention, over the ceiling."""
    bandwidth: float
    products: float
    """Rate of matrix products in a model's shapes, over the ceiling."""
    softmax: float
    """Head size whose products at the ceiling take as long as softmax."""
    uncached: float
    """Fraction of the traffic between a layer's operations that reaches memory."""
    wide: float
    """activation traffic relative to that of 16-bit activations"""
    launch_seconds: float
    l2_bytes_per_sm: float
    sms: int
    on_cpu: bool


def predict_step_time(work: Workload, hardware: Hardware, constants: Constants = FITTED) -> StepTime | None:
    """Predict the step time on this device; None if its peak, bandwidth or class is unknown."""
    device = device_rates(work, hardware, constants)
    if device is None:
        return None
    k = constants
    on_cpu = hardware.kind == "cpu"
    each_byte = work.tokens / device.bandwidth  # seconds a byte of each token
    activations = work.tokens * device.wide / device.bandwidth  # and of one in 16 bits
    options, layers = of_layer(work, on_cpu), work.shape.n_layer
    forward = {
        "matrix products of the blocks": _block_products(work, device, k),
        "attention": _attention(work, device, k),
        "vocabulary head": _vocabulary_head(work, device, k),
        "softmax and loss": _loss_bytes(work, device, k) * activations + of_logits(work, on_cpu) * each_byte,
        "norms and elementwise": device.uncached
        * (_elementwise_bytes(work, k) * activations + layers * options.bytes * each_byte),
    }
    micro = forward | {
        "weights and gradients": _weight_bytes(work, device, k) / device.bandwidth,
        "recomputation": _recomputation(work, forward, k),
    }
    busy = sum(micro.values())
    kernels = options.kernels * layers + _kernels(work, on_cpu, k)
    launches = kernels * device.launch_seconds
    tails = 0.0 if on_cpu else kernels * k.kernel_tail_seconds
    exposed = tails + max(0.0, launches - busy - tails) + k.step_gap_seconds / work.grad_accum
    micro["launching kernels"] = launches if on_cpu else exposed
    micro["waiting for the batch"] = k.gap_seconds * work.program.waits_for_batch
    per_step = {"optimizer": _optimizer(work, device, k)}
    if work.gpus > 1:
        once, each = _communication(work, hardware, busy, k)
        per_step["gradient synchronisation"] = once + work.grad_accum * each
    step = {name: work.grad_accum * seconds for name, seconds in micro.items()} | per_step
    parts = [Part(name=n, value=s, formula=FORMULAS["step"][n]) for n, s in step.items()]
    # A forward pass has a third of the products and of the traffic, 2 of 7 products of attention.
    forward_seconds = sum(v for name, v in forward.items() if name != "attention") / 3 + forward["attention"] * 2 / 7
    forward_only = forward_seconds + launches / 3 if on_cpu else max(forward_seconds, launches / 3)
    launching = sum(p.value for p in parts if p.name == "launching kernels")
    share = 0.0 if on_cpu else launching / sum(p.value for p in parts)
    factor, caveats = interval_factor(work, hardware, constants, share)
    return StepTime([p for p in parts if p.value > 0], forward_only, factor, caveats)


def counted_clock_hz(hardware: Hardware) -> float | None:
    """Return the SM clock that a prediction assumes: the lowest at which its ceiling is possible.

    It is the datasheet's boost clock, or higher if the GPU model was measured above its datasheet peak, as Ada was.
    None if the ceiling, or the clock of the peak, is unknown.
    """
    reached, peak = FITTED.classes.get(hardware.architecture), hardware.peak_flops
    if reached is None or peak is None or hardware.boost_clock_hz is None:
        return None
    return hardware.boost_clock_hz * max(1.0, _ceiling(hardware, reached, peak) / peak)


def device_rates(work: Workload, hardware: Hardware, k: Constants) -> DeviceRates | None:
    """Return the performance of a device in a workload; None if its peak, bandwidth or class is unknown."""
    reached = k.classes.get(hardware.architecture)
    peak, datasheet = hardware.peak_flops, hardware.bandwidth_bytes_per_second
    if reached is None or peak is None or datasheet is None:
        return None
    ceiling = _ceiling(hardware, reached, peak)
    if work.dtype == "float32" and hardware.float32_flops is not None:
        ceiling = k.float32_of_peak * hardware.float32_flops
    attention = reached.attention
    if work.attention == "flash3":
        attention = max(attention, reached.attention_best)
    on_cpu = hardware.kind == "cpu"
    wide = work.element_bytes / 2
    if wide == 2 and not work.compiled and not on_cpu:
        wide = k.eager_float32
    rate, slowdown = _rate(hardware, peak), _effect(hardware, k).factor
    idle = 0.0 if on_cpu else k.idle_per_sm * (hardware.sms or 0)
    tensor = work.tokens * work.shape.n_embd * work.element_bytes
    cache = reached.l2_bytes_per_sm * (hardware.sms or 0)
    return DeviceRates(
        wide=wide,
        uncached=1 - k.cached * cache / (cache + tensor),
        softmax=k.softmax_clocks * rate / 14 if rate else 0.0,
        ceiling=ceiling / slowdown,
        attention=attention,
        products=k.products * reached.products / (1 + idle),
        bandwidth=datasheet * (1.0 if on_cpu else k.bandwidth_share) / slowdown,
        l2_bytes_per_sm=reached.l2_bytes_per_sm,
        sms=hardware.sms or 1,
        on_cpu=on_cpu,
        launch_seconds=k.launch_seconds_cpu if on_cpu else k.launch_seconds,
    )


def _effect(hardware: Hardware, k: Constants) -> Effect:
    """Return the effect of the GPU if runs of it are published, else of its class."""
    unseen = Effect(1.0, k.classes[hardware.architecture].unseen_spread, 0)
    of_class = k.effects.get(effect_class(hardware.architecture, hardware.kind), unseen)
    return k.effects.get(hardware.name, of_class)


def _rate(hardware: Hardware, peak: float) -> float | None:
    """Return the FLOP per clock and SM of the matrix units; None on a CPU."""
    if hardware.sms is None or hardware.boost_clock_hz is None:
        return None
    return peak / (hardware.sms * hardware.boost_clock_hz)


def _ceiling(hardware: Hardware, reached: DeviceClass, peak: float) -> float:
    """Return the FLOP/s of a large matrix product under the power limit in force.

    A measurement on such a GPU replaces the class's value; a lowered limit scales either.
    """
    under_limit = _by_class(hardware, reached, peak, hardware.power_limit_watts)
    if hardware.matmul_flops is None:
        return under_limit
    board = _by_class(hardware, reached, peak, hardware.board_power_watts)
    return hardware.matmul_flops * under_limit / board


def _by_class(hardware: Hardware, reached: DeviceClass, peak: float, limit_watts: float | None) -> float:
    """Return the FLOP/s at the clock that the watts per SM sustain, at most the class's ceiling."""
    rate, board = _rate(hardware, peak), hardware.board_power_watts
    highest = reached.ceiling_of_peak * peak
    limit = limit_watts or board
    if rate is None or limit is None or reached.clock_at_watt is None:
        return highest
    assert hardware.sms is not None
    board = board or limit
    dynamic = (limit - STATIC_SHARE * board) / (1 - STATIC_SHARE)
    watts = max(dynamic, 0.1 * board) / hardware.sms
    clock = 1e9 * reached.clock_at_watt * watts**POWER_EXPONENT * (512 / rate) ** RATE_EXPONENT
    return float(min(highest, hardware.sms * rate * clock))


def _products(matrices: list[tuple[int, int]], work: Workload, device: DeviceRates, k: Constants) -> float:
    """Return the seconds of n x (a -> b) matrix products, forward and both of the backward pass.

    Each of the three reads and writes n a and n b values.
    """
    n, seconds = work.tokens, 0.0
    for a, b in matrices:
        arithmetic = 6 * n * a * b / (device.ceiling * device.products)
        moved = device.uncached * n * (a + b) + a * b
        traffic = 3 * moved * work.element_bytes / device.bandwidth
        if device.on_cpu:  # whose rate was measured with its traffic
            traffic = 0.0
        seconds += (arithmetic**k.overlap + traffic**k.overlap) ** (1 / k.overlap)
    return seconds


def _block_products(work: Workload, device: DeviceRates, k: Constants) -> float:
    seconds = work.shape.n_layer * _products(layer_matrices(work.shape), work, device, k)
    return seconds / k.fp8_speed if work.program.fp8_products else seconds


def _vocabulary_head(work: Workload, device: DeviceRates, k: Constants) -> float:
    """Return the seconds of the vocabulary head's products, including the overhead of chunks.

    Each chunk reads and writes the fp32 gradient of the whole weight; a CPU also writes and reads the chunk's
    contribution in 16 bits. Without accumulation in place, the first addition is counted with the weights.
    """
    width, vocabulary = work.shape.n_embd, work.shape.vocabulary
    seconds = _products([(width, vocabulary)], work, device, k)
    seconds *= k.unaligned_head if vocabulary % 8 else 1.0
    if work.head == "chunked":
        chunks = _chunks(work, device.on_cpu)
        each = (12 if device.on_cpu and work.element_bytes == 2 else 8) * width * vocabulary
        additions = chunks if _is_in_place(work, device) else chunks - 1
        seconds += additions * each / device.bandwidth
    return seconds


def _chunks(work: Workload, on_cpu: bool) -> int:
    """Return the number of the vocabulary head's chunks of tokens."""
    kind = "cpu" if on_cpu else "cuda"
    return math.ceil(work.tokens / chunk_tokens(work.tokens, work.shape.vocabulary, kind))


def _kernels(work: Workload, on_cpu: bool, k: Constants) -> float:
    """Return the launches of a micro-batch of GPT-2, as counted for the program if it is compiled for a GPU."""
    layers, program = work.shape.n_layer, work.program
    if not work.compiled:
        return k.kernels_per_layer_eager * layers + k.kernels
    if on_cpu or program.layer_launches is None or program.launches is None:
        return k.kernels_per_layer * layers + k.kernels
    chunks = _chunks(work, on_cpu) if work.head == "chunked" else 1
    return program.layer_launches * layers + program.launches + 3 * (chunks - 1)


def _is_in_place(work: Workload, device: DeviceRates) -> bool:
    """Return True if gradients of embedding and head cost no passes of their own, on a GPU."""
    return work.in_place and not device.on_cpu


def _loss_bytes(work: Workload, device: DeviceRates, k: Constants) -> float:
    """Return the bytes per token moved by softmax and cross-entropy, in 16 bits.

    The chunked head's second pass finds logits in the L2 cache as far as it holds the rows that are in flight, about
    three an SM: it then saves a third of the traffic.
    """
    if not work.compiled:
        return work.shape.vocabulary * k.loss_bytes_eager
    returned = k.returned_logits_bytes if work.program.logits_kept else 0.0
    saved = 0.0
    if work.head == "chunked":
        row = work.element_bytes * work.shape.vocabulary
        saved = k.loss_bytes / 3 * min(1.0, device.l2_bytes_per_sm / (3 * row))
    return work.shape.vocabulary * (k.loss_bytes - saved + returned)


def _weight_bytes(work: Workload, device: DeviceRates, k: Constants) -> float:
    """Return the mean bytes per micro-batch for casting weights and accumulating gradients.

    Tuned products write the blocks' gradients in fp32, without a cast of 2 + 4 bytes. In place, only the rows that were
    looked up are read and written: 12 B a value.
    """
    tables = work.shape.table_parameters
    counted = count_parameters(work.shape)
    looked_up = k.table_bytes * tables
    multiplied = counted.total - tables
    if _is_in_place(work, device):
        multiplied -= counted.vocabulary * (1 if work.shape.tied_head else 2)
        looked_up += 12.0 * work.tokens * work.shape.n_embd
    added = k.accumulation_bytes * (1 - 1 / work.grad_accum)
    moved = (k.weight_bytes + added) * multiplied + looked_up
    moved -= 6.0 * counted.block_matrices * work.tuned
    return moved * (1 if work.program.master_weights else 0.5) / work.shards


def _attention(work: Workload, device: DeviceRates, k: Constants) -> float:
    """Return the seconds of attention: fused (causal half of 2 + 5 products) or plain (T x T)."""
    shape, n = work.shape, work.tokens
    queries = shape.query_width
    if work.attention == "plain":
        flops = 12.0 * n * shape.context * queries * shape.n_layer
        each = k.score_bytes if work.compiled else k.score_bytes_eager
        if work.dropout:
            each *= k.score_dropout
        scores = n * shape.context * shape.n_head * shape.n_layer * each * device.wide
        return flops / (device.ceiling * device.products) + scores / device.bandwidth
    context = shape.context * shape.attended
    half = 1 + 128 / context  # tiles on the diagonal are computed in full
    flops = 7 * n * context * queries * shape.n_layer * half
    # Softmax takes as long per score at any head size, and overlaps with the products.
    slower = math.hypot(1 / device.attention, device.softmax / shape.head_size)
    dropout = k.attention_dropout if work.dropout else 1.0
    return flops * dropout * slower / device.ceiling


def _elementwise_bytes(work: Workload, k: Constants) -> float:
    """Return the bytes per token moved by norms, activations, residuals and dropout, in 16 bits."""
    shape = work.shape
    if work.compiled:
        per_width, per_mlp, dropout = k.norm_bytes, k.mlp_bytes, k.dropout_bytes
        # In products, the activation's input is not read, its gradient not written and read.
        per_mlp -= 6.0 * work.tuned
    else:
        per_width, per_mlp, dropout = k.norm_bytes_eager, k.mlp_bytes_eager, k.dropout_bytes_eager
    if work.program.wide_residual and work.element_bytes == 2:
        per_width += k.wide_residual_bytes if work.compiled else k.wide_residual_bytes_eager
    per_layer = shape.n_embd * (per_width + (dropout if work.dropout else 0.0))
    per_layer += shape.mlp_width * per_mlp * (k.gated_mlp if shape.mlp_matrices == 3 else 1.0)
    return shape.n_layer * per_layer


def _recomputation(work: Workload, forward: dict[str, float], k: Constants) -> float:
    """Return the seconds of recomputing the blocks' forward pass: full, or selective in part."""
    if work.checkpointing == "none":
        return 0.0
    again = forward["matrix products of the blocks"] / 3 + forward["norms and elementwise"] / 3
    again += forward["attention"] * (1 / 3 if work.attention == "plain" else 2 / 7)
    return again * (1.0 if work.checkpointing == "full" else k.selective)


def _optimizer(work: Workload, device: DeviceRates, k: Constants) -> float:
    counted = count_parameters(work.shape)
    each = k.adamw_foreach_bytes if work.optimizer == "adamw_foreach" else k.adamw_bytes
    by_adamw = counted.total - (counted.block_matrices if work.optimizer == "muon" else 0)
    moved = (each * by_adamw + k.clip_bytes * counted.total * work.clipped) / work.shards
    share = 1 / work.gpus if work.sharding == "optimizer" else 1 / work.shards
    newton_schulz = launches = 0.0
    if work.optimizer == "muon":
        by_muon = MUON_BYTES if work.program.muon_restored else k.muon_bytes
        moved += by_muon * counted.block_matrices * share
        matrices = layer_matrices(work.shape)
        newton_schulz = (
            work.program.newton_schulz_steps
            * work.shape.n_layer
            * sum(_newton_schulz(a, b, work.program.muon_batched, device, k) for a, b in matrices)
        )
        if work.program.muon_restored:
            launches = MUON_KERNELS * work.shape.n_layer * len(matrices) * device.launch_seconds
    half = 1.0 if work.program.master_weights else 0.5
    busy = half * moved / device.bandwidth + share * newton_schulz
    return busy + launches if device.on_cpu else max(busy, launches)


def _newton_schulz(a: int, b: int, batched: bool, device: DeviceRates, k: Constants) -> float:
    """Return the seconds of one Newton-Schulz iteration on an a x b matrix.

    One matrix alone is so small that the tiles of a product, 128 x 128, leave SMs idle; a CPU does these products, in
    16 bits, as it does a model's.
    Source: Jordan et al. 2024, Muon: A = X X^T, B = b A + c A A, X = a X + B X.
    """
    small, large = min(a, b), max(a, b)
    seconds = 0.0
    for rows, columns, inner in ((small, small, large), (small, small, small), (small, large, small)):
        tiles = math.ceil(rows / 128) * math.ceil(columns / 128)
        used = tiles / (device.sms * math.ceil(tiles / device.sms))
        rate = k.newton_schulz if batched else k.newton_schulz_alone * used
        if device.on_cpu:
            rate = device.products
        flops = 2 * rows * columns * inner
        seconds += flops / (device.ceiling * rate)
    return seconds


def _communication(work: Workload, hardware: Hardware, busy: float, k: Constants) -> tuple[float, float]:
    """Return the seconds of communication not hidden by computation: per step, per micro-batch.

    Gradients are exchanged, and weights too if sharded. A ring all-reduce moves 2 (w - 1) / w of the bytes over each
    device's link.
    """
    counted = count_parameters(work.shape)
    total = counted.total
    link, network = _link(hardware, k), k.network_bytes_per_second
    if hardware.architecture == "a100":
        network = k.network_bytes_per_second_a100
    nodes = math.ceil(work.gpus / GPUS_OF_A_NODE)
    ring = (work.gpus - 1) / work.gpus
    slowest = link if nodes == 1 else min(link, network)
    if work.sharding in ("full", "hybrid"):
        # Weights gathered for the forward and the backward pass, gradients scattered once: all in 16 bits, or as
        # train.py does it, the last in fp32, as what is outside of the blocks.
        moved = 6 * total
        if work.program.fp32_exchange:
            of_blocks = counted.block_matrices
            moved = (2 * work.element_bytes + 4) * of_blocks + 8 * (total - of_blocks)
        if work.sharding == "full":
            seconds = moved * ring / slowest
        else:
            seconds = moved * (work.shards - 1) / work.shards / link
            seconds += 4 * total / work.shards * (nodes - 1) / nodes / network
        hidden = min(seconds, k.hidden_share_sharded * busy)
        return 0.0, seconds - hidden + k.interference * hidden
    seconds = 2 * (4 if work.program.master_weights else 2) * total * ring / slowest
    hidden = min(seconds, k.hidden_share * 2 / 3 * busy) if work.overlapped else 0.0
    exposed = seconds - hidden + k.interference * hidden
    return (0.0, exposed) if work.program.sync_every_micro_step else (exposed, 0.0)


def _link(hardware: Hardware, k: Constants) -> float:
    """Return the B/s that a collective reaches over the link between the GPUs of one machine."""
    if _over_pcie(hardware):
        return k.pcie_share * (hardware.interconnect_bytes_per_second or k.pcie_bytes_per_second)
    assert hardware.interconnect_bytes_per_second is not None
    return k.link_share * hardware.interconnect_bytes_per_second


def _over_pcie(hardware: Hardware) -> bool:
    return hardware.interconnect is None or hardware.interconnect.startswith("PCIe")


def interval_factor(
    work: Workload, hardware: Hardware, k: Constants, launching: float
) -> tuple[Interval, tuple[str, ...]]:
    """Return the interval as factors of the expected time, and the reasons for its width.

    `launching` is the share of kernel launches on a GPU in the step.
    """
    effect, on_cpu = _effect(hardware, k), hardware.kind == "cpu"
    spread = math.hypot(SETUP_SPREAD, effect.spread)
    caveats = []
    if on_cpu:
        caveats.append("CPUs differ much in small operations; plan.py --calibrate measures this one")
    elif effect.sources == 0:
        caveats.append("no published run of this class is known: the interval is a guess")
    elif hardware.name not in k.effects:
        sources = f"{effect.sources} source{'s' * (effect.sources > 1)}"
        caveats.append(f"no run of this card is known; its class is known from {sources}")
    elif effect.sources == 1:
        caveats.append("runs of this card are known from one source alone")
    if launching > 0.1:
        share = f"{100 * launching:.0f} % of the step"
        caveats.append(f"kernel launches take {share}, and their time differs most")
    if not on_cpu and not work.compiled:
        spread = math.hypot(spread, EAGER_SPREAD)
        caveats.append("without torch.compile programs differ more from each other")
    if not on_cpu and is_beyond_gpt2(work):
        caveats.append("what this model and optimizer do beyond GPT-2 was counted, not measured")
    if work.tuned:
        caveats.append("what tuned matrix products save was counted, not measured")
    if work.gpus > 1 and not on_cpu and _over_pcie(hardware):
        caveats.append("one of three sources with several cards over PCIe took a quarter longer")
    factor = math.exp(1.645 * spread)  # nine in ten of a normal distribution
    return Interval(1 / factor, 1.0, factor), tuple(caveats)

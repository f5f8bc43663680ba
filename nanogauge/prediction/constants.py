"""What devices reach and what operations move: the constants of the step-time roofline.

The defaults are priors: counts of reads and writes, data sheets, published measurements of parts.
`bench/fitting.py --write` fits some of them to published runs and writes the numbers to
nanogauge/constants.toml. docs/prediction.md has the fit and its errors with every source and class
left out in turn. Bytes are per 16-bit value unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nanogauge.files import package_table


@dataclass(frozen=True)
class DeviceClass:
    """Rates that a GPU architecture reaches."""

    ceiling_of_peak: float
    """Rate of a large matrix product over the peak, where power does not limit it."""
    attention: float
    """Rate of the products inside SDPA's causal flash attention, over that ceiling."""
    attention_best: float
    """The same for the best kernel (FlashAttention 3, cuDNN)."""
    clock_at_watt: float | None = None
    """SM clock in GHz that one watt per SM sustains in matrix products of 512 FLOP per clock; None
    if power is not modelled."""
    l2_bytes_per_sm: float = 0.0
    """L2 cache per SM in bytes; 0 if it is too small to hold activations."""
    products: float = 1.0
    """Rate of a model's matrix products, relative to that of other classes."""
    unseen_spread: float = 0.15
    """Standard deviation of the log of the step time without a published run of the class.
    Source: the errors of NVIDIA's classes since Ampere, each left out; twice that for others."""


@dataclass(frozen=True)
class Effect:
    """Measured over predicted step time of a class or a GPU, from published runs."""

    factor: float
    spread: float
    """Standard deviation of the log of the factor for a GPU of this class, or for this GPU."""
    sources: int
    """Independent sources of the published runs."""


@dataclass(frozen=True)
class Constants:
    classes: dict[str, DeviceClass]
    effects: dict[str, Effect] = field(default_factory=dict)
    """By effect_class, and by the name of a GPU with published runs."""
    products: float = 0.98
    """Rate of matrix products in a model's shapes over the ceiling."""
    bandwidth_share: float = 0.85
    """Reachable fraction of a data sheet's memory bandwidth."""
    float32_of_peak: float = 0.95
    """Rate of an fp32 matrix product over the fp32 peak: A100 0.93-0.98, 4090 0.65 (power)."""
    overlap: float = 3.0
    """Exponent p of (arithmetic^p + traffic^p)^(1/p), the time of a matrix product."""
    cached: float = 0.3
    """Fraction of the traffic between operations that the L2 cache saves for small activations;
    half of it for a tensor as large as the cache."""
    idle_per_sm: float = 1e-3
    """Fraction by which each SM lengthens matrix products, idle in the last wave of tiles."""
    softmax_clocks: float = 0.68
    """SM clocks per attention score for softmax, forward and backward. Source: FlashAttention-2 on
    A100 and H100 at head sizes 64 and 128 (Dao 2023, arXiv 2307.08691)."""

    # Bytes a token moves. Counted: norm and residual stream 36 in 16 bits and 56 with an fp32
    # residual, transposes about 24; MLP 5 reads and writes of its width; eager adds casts.
    norm_bytes: float = 56.0
    wide_residual_bytes: float = 20.0
    norm_bytes_eager: float = 227.0
    wide_residual_bytes_eager: float = 20.0
    mlp_bytes: float = 10.0
    mlp_bytes_eager: float = 25.0
    gated_mlp: float = 1.6
    """traffic of a gated MLP over that of a plain one: 8 reads and writes instead of 5"""
    dropout_bytes: float = 10.0
    dropout_bytes_eager: float = 40.0
    loss_bytes: float = 6.0
    """the logits are read once forward and once backward, and their gradient is written"""
    returned_logits_bytes: float = 4.0
    """If forward also returns the logits: autograd writes and reads zeros as their gradient."""
    loss_bytes_eager: float = 40.0
    unaligned_head: float = 1.41
    """slow-down of the head's product if the vocabulary is not a multiple of 8 (50,257)"""
    score_bytes: float = 24.0
    score_bytes_eager: float = 113.0
    score_dropout: float = 1.3
    attention_dropout: float = 1.08
    eager_float32: float = 1.1
    """traffic of eager fp32 over that of autocast: values are twice as wide, but there are no
    casts"""

    # Bytes per fp32 parameter.
    weight_bytes: float = 12.0
    """per micro-batch: weights cast from 4 to 2 bytes, gradients from 2 to 4"""
    accumulation_bytes: float = 12.0
    """Each micro-batch after the first: its gradient is added to the accumulated one."""
    table_bytes: float = 8.0
    """per micro-batch, for look-up tables"""
    adamw_bytes: float = 28.0
    """reads weight, gradient and two moments, writes three of them"""
    adamw_foreach_bytes: float = 48.0
    muon_bytes: float = 34.0
    clip_bytes: float = 12.0
    """reads for the norm, reads and writes for the scaling"""
    newton_schulz: float = 0.66
    newton_schulz_alone: float = 0.245
    """throughput of Newton-Schulz products over a large product's: batched; one matrix at a time"""

    fp8_speed: float = 1.43
    selective: float = 0.4
    """fraction of the forward pass that selective activation checkpointing recomputes"""
    launch_seconds: float = 7e-6
    launch_seconds_cpu: float = 12e-6
    kernel_tail_seconds: float = 2e-6
    gap_seconds: float = 2e-3
    """Time from a copy that waited for the GPU to the first kernel after it."""
    step_gap_seconds: float = 3e-3
    """Work of the host between two steps that the GPU waits for: reading the loss, optimizer,
    logging. Source: 2 ms and 1.5 ms on a stand-in for the card; published steps of 40-200 ms."""
    kernels_per_layer: float = 28
    kernels_per_layer_eager: float = 150
    kernels: float = 40

    pcie_bytes_per_second: float = 32e9
    pcie_share: float = 0.2
    """Low, as GeForce GPUs have no peer-to-peer copies: a collective passes through host memory."""
    link_share: float = 0.8
    network_bytes_per_second: float = 50e9
    network_bytes_per_second_a100: float = 25e9
    """network bandwidth per GPU: 400 and 200 Gb/s, as in DGX H100 and DGX A100"""
    hidden_share: float = 0.6
    hidden_share_sharded: float = 0.95
    """fraction of the backward pass (under FSDP, of all work) that can hide communication"""
    interference: float = 0.13
    """fraction of hidden communication that still slows the step"""


def effect_class(architecture: str, kind: str) -> str:
    """Return the class of GPUs that share an effect: an architecture, professional boards apart.

    Workstation and data-centre boards have full matrix rates, lower clocks and slower memory.
    """
    mixed = architecture in ("ada", "ampere", "blackwell", "turing")
    return f"{architecture} professional" if mixed and kind in _PROFESSIONAL else architecture


_PROFESSIONAL = ("workstation", "datacenter")


def get(constants: Constants, name: str) -> float:
    """Return a constant by name; "class.field" names a field of a device class."""
    owner, _, field_name = name.rpartition(".")
    return float(getattr(constants.classes[owner] if owner else constants, field_name))


def put(constants: Constants, values: dict[str, float]) -> Constants:
    """Return the constants with values replaced by name."""
    classes, own = dict(constants.classes), dict[str, Any]()
    for name, value in values.items():
        owner, _, field_name = name.rpartition(".")
        if owner:
            classes[owner] = replace(classes[owner], **{field_name: value})
        else:
            own[name] = value
    return replace(constants, classes=classes, **own)


POWER_EXPONENT = 0.55
"""Exponent of the watts per SM in the sustained clock: 1/3 if voltage scales with the clock, 1 at
the lowest voltage."""
RATE_EXPONENT = 0.25
"""Exponent of 512 / (FLOP per clock and SM) in it: wider matrix units draw more power per clock.
Source of both and of clock_at_watt: 62 large products measured on GPUs of 45 to 1,000 W,
github.com/zzc0721/torch-performance-test-data, mean error 3.8 %."""
STATIC_SHARE = 0.2
"""Fraction of a board's default power limit that memory, fans and converters draw at any clock."""

SETUP_SPREAD = 0.1
"""Standard deviation of the log of the step time between set-ups of one GPU."""

_TABLES = package_table("constants.toml")
PRIORS = Constants({name: DeviceClass(**row) for name, row in _TABLES["classes"].items()})
"""The constants before any fit."""
FITTED = replace(
    put(PRIORS, _TABLES["fitted"]),
    effects={name: Effect(**row) for name, row in _TABLES["effects"].items()},
)

"""What devices reach and what operations move: the constants of the step-time roofline.

The defaults are priors: counts of reads and writes, data sheets, published measurements of parts.
`bench/fitting.py --write` fits some of them to published runs and writes the numbers at the end of
this file. docs/prediction.md has the fit and its errors with every source and class left out in
turn. Bytes are per 16-bit value unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class DeviceClass:
    """Rates that a GPU architecture reaches."""

    ceiling_of_peak: float
    """Rate of a large matrix product over the peak, where power does not limit it."""
    clock_at_watt: float | None
    """SM clock in GHz that one watt per SM sustains in matrix products of 512 FLOP per clock; None
    if power is not modelled."""
    attention: float
    """Rate of the products inside SDPA's causal flash attention, over that ceiling."""
    attention_best: float
    """The same for the best kernel (FlashAttention 3, cuDNN)."""
    l2_bytes_per_sm: float = 0.0
    """L2 cache per SM in bytes; 0 if it is too small to hold activations."""
    products: float = 1.0
    """Rate of a model's matrix products, relative to that of other classes."""
    unseen_spread: float = 0.15
    """Standard deviation of the log of the step time without a published run of the class.
    Source: the errors of NVIDIA's classes since Ampere, each left out; twice that for others."""


_CLASSES = {
    "ada": DeviceClass(1.06, 1.26, 0.88, 0.88, 0.7e6),
    "blackwell": DeviceClass(1.08, 1.45, 0.88, 0.88, 0.6e6),
    "ampere": DeviceClass(1.08, 0.84, 0.88, 0.88, 0.07e6),
    "a100": DeviceClass(0.85, 0.94, 0.58, 0.58, 0.37e6),
    "hopper": DeviceClass(0.96, 0.98, 0.363, 0.67, 0.38e6),
    "b200": DeviceClass(0.96, 0.98, 0.18, 0.67, 0.85e6),
    "gb10": DeviceClass(0.80, None, 0.80, 0.80, 0.5e6),
    "cdna2": DeviceClass(0.60, None, 0.27, 0.27, unseen_spread=0.33),
    "cdna3": DeviceClass(0.55, None, 0.22, 0.22, unseen_spread=0.33),
    "rdna3": DeviceClass(0.75, None, 0.27, 0.27, unseen_spread=0.33),
    "apple": DeviceClass(0.80, None, 0.27, 0.27, unseen_spread=0.5),
    "turing": DeviceClass(1.06, 0.89, 0.27, 0.27, unseen_spread=0.33),
    "volta": DeviceClass(0.80, 0.69, 0.27, 0.27, unseen_spread=0.33),
    "pascal": DeviceClass(0.85, None, 0.27, 0.27, unseen_spread=0.33),
    "cpu": DeviceClass(1.0, None, 0.26, 0.26, products=0.78),
}


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
    classes: dict[str, DeviceClass] = field(default_factory=lambda: dict(_CLASSES))
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

# Written by `python bench/fitting.py RUNS.csv ... --write`.
_VALUES: dict[str, float] = {
    "products": 0.9678,
    "bandwidth_share": 0.8037,
    "overlap": 2.954,
    "idle_per_sm": 0.001243,
    "softmax_clocks": 0.7075,
    "kernel_tail_seconds": 2.151e-06,
    "gap_seconds": 0.002097,
    "cached": 0.254,
    "loss_bytes": 6.393,
    "returned_logits_bytes": 4.06,
    "loss_bytes_eager": 42.22,
    "norm_bytes": 57.41,
    "norm_bytes_eager": 235.3,
    "weight_bytes": 12.07,
    "accumulation_bytes": 12.16,
    "score_bytes": 21.74,
    "score_bytes_eager": 107.1,
    "unaligned_head": 1.477,
    "newton_schulz": 0.6556,
    "newton_schulz_alone": 0.1725,
    "fp8_speed": 1.382,
    "interference": 0.1243,
    "pcie_share": 0.1927,
    "ada.attention": 0.8702,
    "a100.attention": 0.5654,
    "hopper.attention": 0.3649,
    "hopper.attention_best": 0.6633,
    "b200.attention": 0.1739,
}
_EFFECTS: dict[str, Effect] = {
    "cpu": Effect(1.0, 0.3, 0),
    "pascal": Effect(2.0, 0.33, 1),
    "a100": Effect(1.033, 0.071, 8),
    "ada": Effect(1.023, 0.071, 7),
    "ada professional": Effect(1.075, 0.073, 1),
    "ampere": Effect(1.018, 0.075, 3),
    "ampere professional": Effect(1.02, 0.07, 1),
    "b200": Effect(1.032, 0.083, 1),
    "blackwell professional": Effect(0.981, 0.076, 2),
    "gb10": Effect(0.994, 0.078, 1),
    "hopper": Effect(1.001, 0.069, 8),
    "volta": Effect(1.024, 0.082, 1),
    "A100 40GB": Effect(1.063, 0.042, 3),
    "A100 80GB": Effect(1.014, 0.03, 5),
    "A40": Effect(1.046, 0.035, 1),
    "A800 PCIe": Effect(1.059, 0.048, 1),
    "B200": Effect(1.065, 0.076, 1),
    "GB10": Effect(0.989, 0.051, 1),
    "H100 96GB HBM2e": Effect(0.994, 0.044, 1),
    "H100 NVL": Effect(1.013, 0.046, 1),
    "H100 PCIe": Effect(1.003, 0.036, 1),
    "H100 SXM": Effect(0.994, 0.028, 7),
    "H200": Effect(1.004, 0.034, 2),
    "L40S": Effect(1.122, 0.038, 1),
    "RTX 3080 Ti": Effect(1.044, 0.072, 1),
    "RTX 3090": Effect(1.01, 0.038, 2),
    "RTX 4000 Ada": Effect(1.106, 0.037, 1),
    "RTX 4070": Effect(0.977, 0.038, 3),
    "RTX 4080": Effect(1.013, 0.048, 1),
    "RTX 4090": Effect(1.104, 0.045, 3),
    "RTX A4000": Effect(0.994, 0.035, 1),
    "RTX A5000": Effect(1.039, 0.035, 1),
    "RTX PRO 6000 Blackwell": Effect(0.963, 0.037, 2),
    "V100 32GB": Effect(1.049, 0.074, 1),
}
SETUP_SPREAD = 0.1
"""Standard deviation of the log of the step time between set-ups of one GPU."""
FITTED = replace(put(Constants(), _VALUES), effects=_EFFECTS)

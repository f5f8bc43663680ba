"""What devices reach and what operations move: the constants of the step-time roofline.

Those of bench/fitting.py were fitted to 46 published runs from 16 sources, each held near a prior
that comes from counting or from a data sheet; docs/prediction.md has the priors, the fit, and the
errors with every source left out in turn. Bytes are per 16-bit value unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceClass:
    """What a class of devices reaches."""

    ceiling_of_peak: float
    """a large matrix product over the peak, where none was measured on the card itself.
    Source: the median of the class in github.com/zzc0721/torch-performance-test-data"""
    attention: float
    """causal flash attention through SDPA, over that ceiling"""
    attention_best: float
    """the same by the best kernel there is (FlashAttention 3, cuDNN)"""
    low: float = 0.86
    high: float = 1.18
    """the interval, as factors of the expected time"""
    caveat: str | None = None
    products: float = 1.0
    """a model's matrix products, relative to what other devices reach"""
    slowdown: float = 1.0
    """what published runs of the class took over all that is explained here"""
    even_head: float = 8.0
    """head size at which the exponentials of softmax take as long as attention's products: 4 D
    FLOPs a score at the class's FLOP per clock and SM, against one of 16 exponentials a clock.
    Source: CUDA C++ programming guide, throughput of native arithmetic instructions"""
    full_power_watts: float | None = None
    """board power at which ceiling_of_peak is reached"""


_UNSEEN = "no published run of this class has been predicted yet: the interval is a guess"


def _classes() -> dict[str, DeviceClass]:
    return {
        "ada": DeviceClass(1.06, 0.84, 0.84, slowdown=1.01),
        "blackwell": DeviceClass(1.06, 0.84, 0.84, 0.70, 1.40, _UNSEEN),
        "ampere": DeviceClass(
            *(1.06, 0.84, 0.84, 0.65, 1.30),
            "the only two runs known of this class, on GeForce 30, were 1.5 times slower than "
            "the others let expect; their slowness is in this figure",
            slowdown=1.53,
        ),
        "a100": DeviceClass(0.84, 0.38, 0.38, even_head=32),
        "hopper": DeviceClass(0.80, 0.233, 0.357, even_head=64, full_power_watts=700),
        "b200": DeviceClass(
            *(0.755, 0.112, 0.33, 0.78, 1.35),
            "one published run of this class is known",
            slowdown=1.24,
            even_head=64,
        ),
        "gb10": DeviceClass(0.80, 0.80, 0.80, even_head=16),
        "cdna2": DeviceClass(0.60, 0.25, 0.25, 0.60, 1.80, _UNSEEN),
        "cdna3": DeviceClass(0.55, 0.20, 0.20, 0.60, 1.80, _UNSEEN),
        "rdna3": DeviceClass(0.75, 0.25, 0.25, 0.60, 1.80, _UNSEEN),
        "apple": DeviceClass(0.80, 0.25, 0.25, 0.50, 2.50, _UNSEEN),
        "turing": DeviceClass(0.65, 0.25, 0.25, 0.60, 1.80, _UNSEEN),
        "volta": DeviceClass(0.75, 0.25, 0.25, 0.60, 1.80, _UNSEEN),
        "pascal": DeviceClass(0.85, 0.25, 0.25, 0.50, 1.80, _UNSEEN, slowdown=2.0),
        "cpu": DeviceClass(
            *(1.0, 0.28, 0.28, 0.60, 1.70),
            "CPUs differ much in small operations; plan.py --calibrate measures this one",
            products=0.78,
        ),
    }


@dataclass(frozen=True)
class Constants:
    classes: dict[str, DeviceClass] = field(default_factory=_classes)
    products: float = 0.91
    """matrix products in a model's shapes over the ceiling"""
    bandwidth_share: float = 0.85
    """reachable share of a data sheet's memory bandwidth"""
    float32_of_peak: float = 0.95
    """fp32 matrix product over the peak of the fp32 units: A100 0.93-0.98, 4090 0.65 (power)"""
    exposed_per_100_sms: float = 0.87
    hidden_sms: float = 41
    """share of the matrix products' traffic that is not hidden behind arithmetic, by the number of
    SMs above hidden_sms: the more tiles run at once, the more memory they wait for together"""

    # Bytes a token moves. Counted: norm and residual stream 36 in 16 bits and 56 with an fp32
    # residual, transposes about 24; MLP 5 reads and writes of its width; eager adds casts.
    norm_bytes: float = 61.0
    wide_residual_bytes: float = 20.0
    norm_bytes_eager: float = 227.0
    wide_residual_bytes_eager: float = 20.0
    mlp_bytes: float = 10.0
    mlp_bytes_eager: float = 25.0
    gated_mlp: float = 1.6
    """8 reads and writes for 5"""
    dropout_bytes: float = 10.0
    dropout_bytes_eager: float = 40.0
    loss_bytes: float = 7.4
    loss_bytes_eager: float = 32.0
    unaligned_head: float = 1.41
    """a vocabulary that is no multiple of 8 (50,257) makes its matrix product slower"""
    score_bytes: float = 24.0
    score_bytes_eager: float = 113.0
    score_dropout: float = 1.3
    attention_dropout: float = 1.08
    eager_float32: float = 1.1
    """fp32 eager traffic over that of autocast: values twice as wide, and no casts"""

    # Bytes per fp32 parameter.
    weight_bytes: float = 16.0
    """each micro-batch: cast 4 -> 2, gradient written, read, and added to the fp32 one"""
    table_bytes: float = 8.0
    """each micro-batch, of a table that is looked up"""
    adamw_bytes: float = 28.0
    """reads weight, gradient and two moments, writes three of them"""
    adamw_foreach_bytes: float = 48.0
    muon_bytes: float = 34.0
    clip_bytes: float = 12.0
    """reads for the norm, reads and writes for the scaling"""
    newton_schulz: float = 0.66
    newton_schulz_alone: float = 0.245
    """Newton-Schulz products over the ceiling: batched, and one matrix at a time"""

    fp8_speed: float = 1.43
    selective: float = 0.4
    """share of the forward pass that selective checkpointing computes again"""
    launch_seconds: float = 7e-6
    launch_seconds_cpu: float = 12e-6
    kernel_tail_seconds: float = 2e-6
    kernels_per_layer: float = 28
    kernels_per_layer_eager: float = 150
    kernels: float = 40

    pcie_bytes_per_second: float = 32e9
    pcie_share: float = 0.3
    """GeForce cards have no peer-to-peer copies: a collective goes through the host's memory"""
    link_share: float = 0.8
    network_bytes_per_second: float = 50e9
    network_bytes_per_second_a100: float = 25e9
    """per GPU between machines: 400 and 200 Gb/s, as in DGX H100 and DGX A100"""
    hidden_share: float = 0.6
    hidden_share_sharded: float = 0.95
    """share of the backward pass, or of all work under FSDP, that can hide communication"""
    interference: float = 0.13
    """what hidden communication still costs"""


FITTED = Constants()

POWER_EXPONENT = 0.28
"""of the watts a board may draw, in the matrix products it does. Source: H100 PCIe, 350 W, and SXM,
700 W, in github.com/zzc0721/torch-performance-test-data"""

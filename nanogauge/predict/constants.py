"""What devices reach, and what operations move: the constants of the step-time roofline.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceClass:
    """What a class of devices reaches."""

    ceiling_of_peak: float
    """a large matrix product over the peak, where none was measured on the card itself"""
    attention: float
    """causal flash attention through SDPA, over that ceiling"""
    attention_best: float
    """the same by the best kernel there is (FlashAttention 3, cuDNN)"""
    low: float = 0.78
    high: float = 1.28
    """the interval, as factors of the expected time"""
    caveat: str | None = None
    slowdown: float = 1.0
    """what published runs of the class took over all that is explained here"""
    full_power_watts: float | None = None
    """board power at which ceiling_of_peak is reached"""


_UNVALIDATED = "no published run of this class has been predicted yet: the interval is a guess"


def _classes() -> dict[str, DeviceClass]:
    return {
        "ada": DeviceClass(1.06, 0.80, 0.80),
        "blackwell": DeviceClass(1.06, 0.80, 0.80, 0.70, 1.40, _UNVALIDATED),
        "gb10": DeviceClass(0.80, 0.80, 0.80),
        "b200": DeviceClass(0.755, 0.15, 0.33),
        "ampere": DeviceClass(1.06, 0.80, 0.80, 0.78, 1.60),
        "a100": DeviceClass(0.84, 0.37, 0.37),
        "hopper": DeviceClass(0.80, 0.21, 0.33, full_power_watts=700),
        "turing": DeviceClass(0.65, 0.25, 0.25, 0.60, 1.80, _UNVALIDATED),
        "volta": DeviceClass(0.75, 0.25, 0.25, 0.60, 1.80, _UNVALIDATED),
        "pascal": DeviceClass(0.85, 0.25, 0.25, 0.60, 1.80, _UNVALIDATED),
        "cpu": DeviceClass(1.0, 0.39, 0.39, 0.60, 1.70, "CPUs differ much in small operations"),
    }


@dataclass(frozen=True)
class Constants:
    classes: dict[str, DeviceClass] = field(default_factory=_classes)
    products: float = 0.915
    """matrix products in a model's shapes over the ceiling"""
    bandwidth_share: float = 0.85
    """reachable share of a datasheet's memory bandwidth"""
    float32_of_peak: float = 0.9
    loss_bytes: float = 8.0
    loss_bytes_eager: float = 32.0
    norm_bytes: float = 76.0
    mlp_bytes: float = 10.0
    norm_bytes_eager: float = 238.0
    mlp_bytes_eager: float = 25.0
    dropout_bytes: float = 10.0
    dropout_bytes_eager: float = 40.0
    attention_dropout: float = 1.08
    score_bytes: float = 24.0
    score_bytes_eager: float = 80.0
    score_dropout: float = 1.3
    weight_bytes: float = 16.0
    table_bytes: float = 8.0
    adamw_bytes: float = 30.0
    adamw_foreach_bytes: float = 48.0
    muon_bytes: float = 34.0
    newton_schulz: float = 0.45
    selective: float = 0.4
    launch_seconds: float = 7e-6
    launch_seconds_cpu: float = 12e-6
    kernels_per_layer: float = 28
    kernels_per_layer_eager: float = 150
    kernels: float = 40
    exposed_per_100_sms: float = 0.65
    exposed_most: float = 0.8
    hidden_sms: float = 20
    fp8_speed: float = 1.4
    unaligned_head: float = 1.3
    pcie_bytes_per_second: float = 32e9
    pcie_share: float = 0.3
    link_share: float = 0.8
    gpus_per_node: int = 8
    network_bytes_per_second: tuple[float, float] = (50e9, 25e9)
    hidden_share: float = 0.6
    hidden_share_sharded: float = 0.8
    interference: float = 0.25


FITTED = Constants()

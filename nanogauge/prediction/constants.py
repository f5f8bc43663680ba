"""What devices reach and what operations move: the constants of the step-time roofline.

nanogauge/constants.toml has the numbers: priors, from counts of reads and writes, data sheets and published
measurements of parts, and what `bench/fitting.py --write` makes of some of them from published runs. docs/prediction.md
has the fit and its errors with every source and class left out in turn. Bytes are per 16-bit value unless said
otherwise.
"""

from dataclasses import dataclass, replace

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
    """SM clock in GHz that one watt per SM sustains in matrix products of 512 FLOP per clock; None if power is not
    modelled."""
    l2_bytes_per_sm: float = 0.0
    """L2 cache per SM in bytes; 0 if it is too small to hold activations."""
    products: float = 1.0
    """Rate of a model's matrix products, relative to that of other classes."""
    unseen_spread: float = 0.15
    """Standard deviation of the log of the step time without a published run of the class. Source: the errors of
    NVIDIA's classes since Ampere, each left out; twice that for others."""


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
    """Constants of the roofline; constants.toml has the prior, meaning and source of each."""

    classes: dict[str, DeviceClass]
    effects: dict[str, Effect]
    """By effect_class, and by the name of a GPU with published runs."""
    numbers: dict[str, float]
    """By name; each is an attribute as well."""

    def __getattr__(self, name: str) -> float:
        if name not in _TABLES["priors"]:
            raise AttributeError(name)
        return self.numbers[name]


def effect_class(architecture: str, kind: str) -> str:
    """Return the class of GPUs that share an effect: an architecture, professional boards apart.

    Workstation and data-centre boards have full matrix rates, lower clocks and slower memory.
    """
    mixed = architecture in ("ada", "ampere", "blackwell", "turing")
    return f"{architecture} professional" if mixed and kind in _PROFESSIONAL else architecture


_PROFESSIONAL = ("workstation", "datacenter")


def put(constants: Constants, values: dict[str, float]) -> Constants:
    """Return the constants with values replaced by name; "class.field" names a field of a device class."""
    classes, numbers = dict(constants.classes), dict(constants.numbers)
    for name, value in values.items():
        owner, _, field_name = name.rpartition(".")
        if owner:
            classes[owner] = replace(classes[owner], **{field_name: value})
        else:
            numbers[name] = value
    return replace(constants, classes=classes, numbers=numbers)


POWER_EXPONENT = 0.55
"""Exponent of the watts per SM in the sustained clock: 1/3 if voltage scales with the clock, 1 at the lowest
voltage."""
RATE_EXPONENT = 0.25
"""Exponent of 512 / (FLOP per clock and SM) in it: wider matrix units draw more power per clock. Source of both and of
clock_at_watt: 62 large products measured on GPUs of 45 to 1,000 W, github.com/zzc0721/torch-performance-test-data, mean
error 3.8 %."""
STATIC_SHARE = 0.2
"""Fraction of a board's default power limit that memory, fans and converters draw at any clock."""

SETUP_SPREAD = 0.1
"""Standard deviation of the log of the step time between set-ups of one GPU."""

_TABLES = package_table("constants.toml")
PRIORS = Constants({n: DeviceClass(**row) for n, row in _TABLES["classes"].items()}, {}, _TABLES["priors"])
"""The constants before any fit."""
FITTED = replace(
    put(PRIORS, _TABLES["fitted"]), effects={name: Effect(**row) for name, row in _TABLES["effects"].items()}
)

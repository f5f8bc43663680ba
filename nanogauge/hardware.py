"""GPUs and their peaks: rows of hardware.toml, found by exact name.

Names are never matched in part, as an "NVIDIA GeForce RTX 4070 Laptop GPU" is not an RTX 4070. The peak of a local GPU
without a row is computed from its properties.
"""

import re
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nanogauge.errors import BadInput
from nanogauge.files import package_table
from nanogauge.schema import Hardware

Kind = Literal["geforce", "workstation", "datacenter", "cpu", "other"]


class Gpu(BaseModel):
    """A row of hardware.toml, whose head documents the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    driver_names: list[str]
    architecture: str
    kind: Kind
    compute_capability: str | None = None
    sms: int
    boost_ghz: float
    flop_per_clock_per_sm: dict[str, int]
    memory_gib: float | None = None
    bandwidth_gb_per_second: float | None = None
    power_watts: float | None = None
    interconnect: str | None = None
    interconnect_gb_per_second: float | None = None
    matmul_tflops: float | None = None
    matmul_source: str | None = None
    source: str

    def peak_flops(self, dtype: str) -> float | None:
        """Return the dense FLOP/s in a dtype with fp32 accumulation; None if unsupported.

        float32 means TF32 if the GPU supports it, as the training loop enables it.
        """
        rate = self.flop_per_clock_per_sm.get(_arithmetic(self.flop_per_clock_per_sm, dtype))
        return None if rate is None else self.sms * rate * self.boost_ghz * 1e9

    @property
    def float32_flops(self) -> float:
        """FLOP/s of the fp32 units, without the matrix units."""
        return self.sms * self.flop_per_clock_per_sm["float32"] * self.boost_ghz * 1e9


_UNITS = {"cdna2": "CUs", "cdna3": "CUs", "rdna3": "CUs", "apple": "GPU cores"}  # else SMs


def _arithmetic(rates: dict[str, int], dtype: str) -> str:
    """Return the key of `rates` that matrix products in a dtype run at."""
    return "tf32" if dtype == "float32" and "tf32" in rates else dtype


DESKTOP_BYTES = 2**30
"""Allowance for the desktop on a GPU that may drive a screen."""


@cache
def all_gpus() -> list[Gpu]:
    return [Gpu.model_validate(row) for row in package_table("hardware.toml")["gpu"]]


def read_gpus(path: Path) -> list[Gpu]:
    """Read GPU rows from a user's TOML file: [[gpu]] tables with the fields of hardware.toml.

    Raises:
        BadInput: if the file cannot be read or a row is invalid.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("gpu")
        gpus = [Gpu.model_validate(row) for row in rows] if isinstance(rows, list) else []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: {reason}; give a TOML file of [[gpu]] rows.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BadInput(f"{path}: {field}: {first['msg']}; rows have the fields of nanogauge/hardware.toml.") from None
    if not gpus:
        raise BadInput(f"{path}: no [[gpu]] row; give one with the fields of hardware.toml.")
    return gpus


_VENDOR_WORDS = re.compile("nvidia|geforce|tesla|amd|radeon|instinct|apple|generation|gpu")
_SIZE = re.compile(r"(?<![a-z0-9])(\d+) ?(?:gb|gib|g)(?![a-z0-9])")
# Drivers report 0-8 % less than the board has: T4 14.7 of 16 GiB, GB10 119.7 of 128.
_REPORTED_SHARE_OF_MEMORY = (0.88, 1.02)


def _plain(name: str) -> tuple[str, float | None]:
    """Split 'NVIDIA A100-SXM4-40GB' into a name without vendor, 'a100sxm4', and its GB, 40.0."""
    lower = re.sub(r"[\s_-]+", " ", name.lower())
    size = _SIZE.search(lower)
    rest = _VENDOR_WORDS.sub("", _SIZE.sub("", lower)).replace(" ", "")
    return rest, float(size[1]) if size else None


_Spelled = list[tuple[Gpu, frozenset[tuple[str, float | None]]]]


def _spell(gpus: Sequence[Gpu]) -> _Spelled:
    return [(g, frozenset(_plain(name) for name in (g.name, *g.driver_names))) for g in gpus]


@cache
def _spellings() -> _Spelled:
    return _spell(all_gpus())


def find_gpu(name: str, memory_bytes: int | None = None, own: Sequence[Gpu] | None = None) -> Gpu | None:
    """Return the row for a GPU name as spelled by the driver, torch or people, or None.

    A size in the name ("RTX 4090 24GB") must match the row, except for Apple's, which vary. memory_bytes selects among
    boards of one name (4060 Ti) and must match; without it, the first row is returned. Only the rows of `own` are
    searched if it is given.
    """
    plain, gb = _plain(name)
    rows = [
        gpu
        for gpu, spellings in (_spellings() if own is None else _spell(own))
        if (plain, gb) in spellings or (gb is not None and (plain, None) in spellings and gpu.memory_gib in (gb, None))
    ]
    if memory_bytes is not None:
        low, high = _REPORTED_SHARE_OF_MEMORY
        rows = [gpu for gpu in rows if gpu.memory_gib is None or low <= memory_bytes / 2**30 / gpu.memory_gib <= high]
    return rows[0] if rows else None


def auto_dtype(name: str, own: Sequence[Gpu] = ()) -> Literal["bfloat16", "float32"]:
    """Return the precision of run.dtype = auto: bfloat16 on a GPU that has it, else float32."""
    gpu = find_gpu(name, own=own) or find_gpu(name)
    return "bfloat16" if gpu is None or gpu.peak_flops("bfloat16") is not None else "float32"


def lookup(name: str, dtype: str, power_limit_watts: float | None = None, own: Sequence[Gpu] = ()) -> Hardware:
    """Return the hardware of a GPU by its exact name, among the user's own rows first.

    Raises:
        BadInput: for a name without a row, with the nearest names; or if the GPU has no matrix units for the dtype.
    """
    gpu = find_gpu(name, own=own) or find_gpu(name)
    if gpu is None:
        query = _plain(name)[0]
        plain_names = [(plain, gpu.name) for gpu, spelled in _spellings() for plain, _ in spelled]
        close = [query, *get_close_matches(query, {p for p, _ in plain_names}, n=3, cutoff=0.4)]
        near = dict.fromkeys(row for c in close for plain, row in plain_names if plain == c)
        nearest = ", ".join(list(near)[:3]) or "none"
        raise BadInput(
            f"no GPU is named {name!r} in nanogauge/hardware.toml; nearest: {nearest}; "
            "or give plan.py a --gpu-file with a [[gpu]] row of your own."
        )
    return from_row(gpu, dtype, power_limit_watts)


def from_row(gpu: Gpu, dtype: str, power_limit_watts: float | None = None) -> Hardware:
    """Return the hardware of a row for a prediction in this dtype."""
    rates = gpu.flop_per_clock_per_sm
    peak = gpu.peak_flops(dtype)
    if peak is None:
        others = " or ".join(d for d in ("bfloat16", "float16", "float32") if d in rates)
        raise BadInput(f"{gpu.name} has no {dtype} matrix units; set --run.dtype {others}.")
    arithmetic = _arithmetic(rates, dtype)
    words = "TF32" if arithmetic == "tf32" else dtype
    measured = gpu.matmul_tflops if dtype != "float32" or set(rates) == {"float32"} else None
    bandwidth, link = gpu.bandwidth_gb_per_second, gpu.interconnect_gb_per_second
    return Hardware(
        name=gpu.name,
        kind=gpu.kind,
        architecture=gpu.architecture,
        peak_flops=peak,
        peak_name=f"{gpu.name}, dense {words}: {gpu.sms} {_UNITS.get(gpu.architecture, 'SMs')} x "
        f"{rates[arithmetic]} FLOP/clock x {gpu.boost_ghz} GHz = {peak / 1e12:.1f} TFLOP/s",
        boost_clock_hz=gpu.boost_ghz * 1e9,
        matmul_flops=measured * 1e12 if measured else None,
        sms=gpu.sms,
        float32_flops=gpu.float32_flops,
        memory_bytes=int(gpu.memory_gib * 2**30) if gpu.memory_gib else None,
        bandwidth_bytes_per_second=bandwidth * 1e9 if bandwidth else None,
        power_limit_watts=power_limit_watts or gpu.power_watts,
        board_power_watts=gpu.power_watts,
        interconnect=gpu.interconnect,
        interconnect_bytes_per_second=link * 1e9 if link else None,
        source=gpu.source,
    )


def from_properties(
    name: str,
    capability: tuple[int, int],
    sms: int,
    memory_bytes: int,
    max_clock_hz: float | None,
    power_limit_watts: float | None,
    dtype: str,
    bandwidth_bytes_per_second: float | None = None,
) -> Hardware:
    """Return the hardware of a local GPU without a row, computed from its properties.

    The FLOP per clock and SM are those of a row with the same compute capability.
    max_clock_hz is the driver's highest SM clock, above the boost clock of datasheets. Without it, or for an unknown
    compute capability, the peak is None.
    """
    alike = [gpu for gpu in all_gpus() if gpu.compute_capability == f"{capability[0]}.{capability[1]}"]
    # Workstation chips are up to twice as fast as GeForce chips of the same capability; some GeForce lack matrix units.
    alike.sort(key=lambda gpu: (gpu.kind != "geforce", -len(gpu.flop_per_clock_per_sm)))
    architecture = alike[0].architecture if alike else "unknown"
    rates = alike[0].flop_per_clock_per_sm if alike else {}
    rate, float32_rate = rates.get(_arithmetic(rates, dtype)), rates.get("float32")
    peak = sms * rate * max_clock_hz if rate and max_clock_hz else None
    if peak is None:
        words = f"unknown: {name} (compute capability {capability[0]}.{capability[1]}) has no row"
    else:
        assert max_clock_hz is not None
        words = (
            f"{name}, computed: {sms} SMs x {rate} FLOP/clock x {max_clock_hz / 1e9:.3f} GHz "
            f"(the driver's highest clock) = {peak / 1e12:.1f} TFLOP/s"
        )
    return Hardware(
        name=name,
        kind="other",
        architecture=architecture,
        peak_flops=peak,
        peak_name=words,
        boost_clock_hz=max_clock_hz if peak is not None else None,
        matmul_flops=None,
        sms=sms,
        float32_flops=sms * float32_rate * max_clock_hz if float32_rate and max_clock_hz else None,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_second=bandwidth_bytes_per_second,
        power_limit_watts=power_limit_watts,
        source="the device's own properties; a row of a plan.py --gpu-file names its peak",
    )


def usually_free_bytes(hardware: Hardware) -> int | None:
    """Return the memory without the allowance for a desktop; None if its size is unknown."""
    total = hardware.memory_bytes
    if total is None or hardware.kind in ("cpu", "datacenter"):
        return total
    return total - DESKTOP_BYTES

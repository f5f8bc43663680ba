"""What is known about GPUs: hardware.toml, one row per card, found by its exact name.

No name is ever matched by a part of it: "NVIDIA GeForce RTX 4070 Laptop GPU" is no RTX 4070. A
card without a row is computed from its own properties where it is present.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

from nanogauge.errors import BadInput
from nanogauge.records import Hardware

Kind = Literal["geforce", "datacenter", "cpu", "other"]


class Gpu(BaseModel):
    """A row of hardware.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    driver_names: list[str]
    architecture: str
    kind: Kind
    sms: int
    boost_ghz: float
    flop_per_clock_per_sm: dict[str, int]
    memory_gib: float
    bandwidth_gb_per_second: float | None
    power_watts: float | None
    matmul_tflops: float | None = None
    matmul_source: str | None = None
    source: str

    def peak_flops(self, dtype: str) -> float | None:
        """Dense FLOP/s in this dtype with fp32 accumulation; None where the cores cannot do it."""
        rate = self.flop_per_clock_per_sm.get(dtype)
        return None if rate is None else self.sms * rate * self.boost_ghz * 1e9


# Matrix products per clock and SM by compute capability, for a card without a row.
# Source: the white papers of the architectures; workstation and GeForce chips of one capability
# differ by up to two in this rate, so the GeForce rate is taken and the prediction says so.
_RATES: dict[tuple[int, int], tuple[str, dict[str, int]]] = {
    (7, 0): ("volta", {"float16": 1024, "float32": 128}),
    (7, 5): ("turing", {"float16": 512, "float32": 128}),
    (8, 0): ("a100", {"bfloat16": 2048, "float16": 2048, "float32": 1024}),
    (8, 6): ("ampere", {"bfloat16": 512, "float16": 512, "float32": 256}),
    (8, 9): ("ada", {"bfloat16": 512, "float16": 512, "float32": 256}),
    (9, 0): ("hopper", {"bfloat16": 4096, "float16": 4096, "float32": 2048}),
    (12, 0): ("blackwell", {"bfloat16": 512, "float16": 512, "float32": 256}),
}


@cache
def all_gpus() -> list[Gpu]:
    text = files("nanogauge").joinpath("hardware.toml").read_text(encoding="utf-8")
    return [Gpu.model_validate(row) for row in tomllib.loads(text)["gpu"]]


def _plain(name: str) -> str:
    """A name without its maker and brand, in one case: 'NVIDIA GeForce RTX 4070' -> 'rtx 4070'."""
    words = re.sub(r"[\s_]+", " ", name.strip()).lower().split(" ")
    return " ".join(w for w in words if w not in ("nvidia", "geforce", "tesla"))


def find_gpu(name: str, memory_bytes: int | None = None) -> Gpu | None:
    """The row with exactly this name, in the spelling of the driver, of torch or of people.

    Where the driver has one name for two boards (4060 Ti), memory_bytes decides between them.
    """
    plain = _plain(name)
    rows = [g for g in all_gpus() if plain in {_plain(n) for n in (g.name, *g.driver_names)}]
    if memory_bytes is not None:
        rows.sort(key=lambda g: abs(g.memory_gib * 2**30 - memory_bytes))
    return rows[0] if rows else None


def lookup(name: str, dtype: str) -> Hardware:
    """The hardware of a plan, by the GPU's exact name.

    Raises:
        BadInput: for a name without a row, with the nearest rows and how to add one; or for a
            dtype that the card has no matrix units for.
    """
    gpu = find_gpu(name)
    if gpu is None:
        names = [g.name for g in all_gpus()]
        lower = {_plain(n): n for n in names}
        near = [lower[n] for n in difflib.get_close_matches(_plain(name), list(lower), n=3)]
        raise BadInput(
            f"no GPU is named {name!r} in nanogauge/hardware.toml; "
            f"nearest: {', '.join(near or names)}; or add a row of your own there."
        )
    return from_row(gpu, dtype)


def from_row(gpu: Gpu, dtype: str, power_limit_watts: float | None = None) -> Hardware:
    """A row as the hardware of a prediction in this dtype.

    Raises:
        BadInput: if the card has no matrix units for the dtype.
    """
    peak = gpu.peak_flops(dtype)
    if peak is None:
        raise BadInput(
            f"{gpu.name} has no {dtype} matrix units; set --run.dtype float16 or float32."
        )
    rate = gpu.flop_per_clock_per_sm[dtype]
    has_tf32 = gpu.architecture not in ("volta", "turing")
    arithmetic = "TF32" if dtype == "float32" and has_tf32 else dtype
    bandwidth = gpu.bandwidth_gb_per_second
    return Hardware(
        name=gpu.name,
        kind=gpu.kind,
        architecture=gpu.architecture,
        peak_flops=peak,
        peak_name=f"{gpu.name}, dense {arithmetic}: {gpu.sms} SMs x "
        f"{rate} FLOP/clock x {gpu.boost_ghz} GHz = {peak / 1e12:.1f} TFLOP/s",
        matmul_flops=gpu.matmul_tflops * 1e12 if gpu.matmul_tflops and dtype != "float32" else None,
        memory_bytes=int(gpu.memory_gib * 2**30),
        bandwidth_bytes_per_second=bandwidth * 1e9 if bandwidth else None,
        power_limit_watts=power_limit_watts or gpu.power_watts,
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
) -> Hardware:
    """The hardware of a card that is present but has no row: computed from what it says of itself.

    max_clock_hz is the driver's highest SM clock, which lies above the boost clock of datasheets;
    without it, or for an unknown compute capability, the peak is None and MFU is not measured.
    """
    architecture, rates = _RATES.get(capability, ("unknown", {}))
    rate = rates.get(dtype)
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
        matmul_flops=None,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_second=None,
        power_limit_watts=power_limit_watts,
        source="the device's own properties; add a row to nanogauge/hardware.toml to name its peak",
    )

"""The sensors of the GPU, as the training loop sees them.

A number that nobody gives is None, and `absent` says why; where there is nothing to read the
sensors are NullSensors. Nothing that happens to the driver is raised into the training loop, and
no function here waits for a driver that hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from nanogauge.measure.absences import Absences, Change
from nanogauge.measure.cards import Watched
from nanogauge.measure.nvml import Driver, NoDriver
from nanogauge.measure.sampler import MEASURED, PowerSpread, Sampler
from nanogauge.records import Sensor

_OPEN_SECONDS = 3.0
"""a driver that needs longer to be found is waited for in its own thread"""
_DESCRIBE_SECONDS = 15.0
"""a driver that nobody used yet may need some seconds to load"""


class Sensors(Protocol):
    """What the training loop sees of the sensors; no call but close waits, and that for a second.

    `cpu_seconds` is what the sampling cost so far, in seconds of one core.
    """

    cpu_seconds: float

    @property
    def absent(self) -> Mapping[str, str]:
        """What is not measured at the moment, and why, by the name of the field.

        Two more names tell how energy_joules came about: energy_counter, why the driver's counter
        is not used, and energy_gaps, for how long the integral of power misses samples.
        """

    @property
    def reason(self) -> str | None:
        """Why nothing is measured at the moment; None while anything is."""

    def changes(self) -> list[Change]:
        """What became absent, or came back, since the last call: each once, in that order."""

    def readings(self) -> list[Sensor]:
        """The readings since the last call, about one for each second."""

    def power_since_last(self) -> PowerSpread | None:
        """The samples of power, in W, since the last call; None if there is none."""

    def close(self) -> list[Sensor]:
        """Stop; the last readings, of which the very last may span less than a second."""


class NullSensors:
    """Sensors that are not there, and why."""

    cpu_seconds = 0.0

    def __init__(self, reason: str, absent: Mapping[str, str] | None = None) -> None:
        self.reason: str | None = reason
        self.absent: Mapping[str, str] = absent or dict.fromkeys(MEASURED, reason)
        absences = Absences()
        absences.missing("gpu", 0.0, reason)
        for name, why in self.absent.items():
            if why != reason:
                absences.missing(name, 0.0, why)
        self._changes = absences.drain()

    def changes(self) -> list[Change]:
        drained, self._changes = self._changes, []
        return drained

    def readings(self) -> list[Sensor]:
        return []

    def power_since_last(self) -> PowerSpread | None:
        return None

    def close(self) -> list[Sensor]:
        return []


def open_sensors(
    device: str | int | Sequence[Watched] | None,
    hz: float,
    clock: Callable[[], float],
) -> Sensors:
    """Begin to sample GPUs, `hz` times a second, in a thread.

    Waits for the driver to be found, at most 3 s; one that needs longer is read from when it
    answers on.

    Args:
        device: the GPU's UUID (with or without "GPU-"), its PCI bus id, or its index as the driver
            counts; None, or an empty list, reads no GPU. Of several the readings hold the sum of
            power and energy, see cards.py.
        hz: samples of power per second.
        clock: gives the seconds since the process began.
    """
    cards = _watched(device)
    if not cards:
        return NullSensors("no GPU")
    sampler = Sampler(cards, hz, clock)
    opened = sampler.wait_opened(_OPEN_SECONDS)
    reason = sampler.reason
    if reason is not None and opened and not sampler.has_gpu:
        return NullSensors(reason, sampler.absent)
    return sampler


@dataclass(frozen=True)
class Idle:
    """Cards to which this program gave nothing to do; None where `reason` says why."""

    power_watts: float | None
    """mean, of all of them together"""
    utilization: float | None
    """mean share of the time in which other programs used it, or them"""
    seconds: float
    """how long it was measured"""
    reason: str | None


def _watched(device: str | int | Sequence[Watched] | None) -> Sequence[Watched]:
    if isinstance(device, (str, int)):
        return [Watched(device)]
    return device or []


def measure_idle(device: str | int | Sequence[Watched], hz: float, seconds: float) -> Idle:
    """Measure GPUs, named as in open_sensors, for so many seconds, and wait for that.

    Returns at once if it cannot be read; waits a second longer at most if the driver hangs. On
    most cards the driver's power is itself a mean over about a second, in which the first samples
    still hold what was before.
    """
    begin = time.monotonic()
    sampler = Sampler(_watched(device), hz, time.monotonic)
    opened = sampler.wait_opened(seconds)
    start = time.monotonic()
    if opened and sampler.has_gpu:
        time.sleep(max(0.0, begin + seconds - start))
    readings = sampler.close()
    spread = sampler.power_since_last()
    rates = [r.utilization for r in readings if r.utilization is not None]
    return Idle(
        power_watts=None if spread is None else spread.mean_watts,
        utilization=round(fmean(rates), 3) if rates else None,
        seconds=round(time.monotonic() - start, 6) if readings else 0.0,
        reason=sampler.absent.get("power_watts") if spread is None else None,
    )


@dataclass(frozen=True)
class DriverInfo:
    """A GPU as the driver describes it; None where it does not, and `absent` says why."""

    name: str | None = None
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    """the newest CUDA that the driver can run"""
    total_bytes: int | None = None
    max_sm_clock_hz: float | None = None
    """the highest the card may be set to, above the boost clock of its datasheet"""
    power_limit_watts: float | None = None
    """what is enforced now"""
    power_limit_default_watts: float | None = None
    """the limit the board is shipped with"""
    slowdown_celsius: float | None = None
    """from which temperature on the hardware lowers its clocks"""
    max_pcie_generation: int | None = None
    """the best that card and machine can do together, as with the next one"""
    max_pcie_width: int | None = None
    used_by_others_bytes: int | None = None
    """what this process cannot have: in use by other processes, or kept by the driver; where the
    driver cannot tell processes apart, this process counts among the others, so ask early"""
    others: dict[str, int] | None = None
    """bytes that other processes hold, by the name of their program"""
    absent: dict[str, str] = field(default_factory=dict)


def driver_info(device: str | int) -> DriverInfo:
    """Describe a GPU, named as in open_sensors, as the driver sees it now.

    A driver that has not answered after 15 s is left alone.
    """
    told: list[DriverInfo] = []
    thread = threading.Thread(target=lambda: told.append(_describe(device)), daemon=True)
    thread.start()
    thread.join(_DESCRIBE_SECONDS)
    return told[0] if told else _undescribed("the driver does not answer")


def _undescribed(reason: str) -> DriverInfo:
    names = [name for name in DriverInfo.__dataclass_fields__ if name != "absent"]
    return DriverInfo(absent=dict.fromkeys(names, reason))


def _describe(device: str | int) -> DriverInfo:
    absences = Absences()
    try:
        driver = Driver(device, absences)
    except NoDriver as error:
        return _undescribed(str(error))
    now = 0.0
    used_bytes = driver.device_used_bytes(now)
    own_bytes = driver.process_used_bytes(now) or 0
    info = DriverInfo(
        name=driver.name(now),
        driver_version=driver.driver_version(now),
        cuda_version=driver.cuda_version(now),
        total_bytes=driver.total_bytes(now),
        max_sm_clock_hz=driver.max_sm_clock_hz(now),
        power_limit_watts=driver.power_limit_watts(now),
        power_limit_default_watts=driver.power_limit_default_watts(now),
        slowdown_celsius=driver.slowdown_celsius(now),
        max_pcie_generation=driver.max_pcie_generation(now),
        max_pcie_width=driver.max_pcie_width(now),
        used_by_others_bytes=None if used_bytes is None else used_bytes - own_bytes,
        others=driver.others(now),
    )
    driver.close()
    reasons = absences.reasons()
    if used_bytes is None and "device_used_bytes" in reasons:
        reasons["used_by_others_bytes"] = reasons["device_used_bytes"]
    for name, value in vars(info).items():
        if value is None:
            info.absent[name] = reasons.get(name) or reasons.get("gpu", "the driver lost the GPU")
    return info

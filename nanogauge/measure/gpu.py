"""The GPU's sensors, as the NVIDIA driver gives them (NVML), sampled beside the training loop.

A number the driver does not give is None, and `absent` says why; without a GPU the sensors are
NullSensors. Nothing that happens to the driver is raised into the training loop.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from types import ModuleType
from typing import Any, Protocol

from nanogauge.records import Sensor

MEASURED = tuple(
    name for name in Sensor.model_fields if name not in ("kind", "elapsed_seconds", "energy_source")
)
"""the fields of a reading that are measured; `absent` speaks of them by these names"""

_GAP_PERIODS = 5
"""samples further apart than so many periods have an unknown power between them"""
_CLOSE_SECONDS = 1.0
"""a driver that does not answer for so long at the end is left alone"""


class Sensors(Protocol):
    """What the training loop sees of the GPU's sensors."""

    @property
    def absent(self) -> Mapping[str, str]:
        """What is not measured, and why, by the name of the field.

        Two more names tell how energy_joules came about: energy_counter, why the driver's counter
        is not used, and energy_gaps, for how long the integral of power misses samples.
        """

    @property
    def reason(self) -> str | None:
        """Why nothing is measured, or nothing any more; None while the sensors are read."""

    def readings(self) -> list[Sensor]:
        """The readings since the last call, about one for each second; does not wait."""

    def close(self) -> list[Sensor]:
        """Stop; the last readings, of which the very last may span less than a second."""


class NullSensors:
    """Sensors that are not there, and why."""

    def __init__(self, reason: str) -> None:
        self.reason: str | None = reason
        self.absent: Mapping[str, str] = dict.fromkeys(MEASURED, reason)

    def readings(self) -> list[Sensor]:
        return []

    def close(self) -> list[Sensor]:
        return []


def open_sensors(device: str | int, hz: float, clock: Callable[[], float]) -> Sensors:
    """Begin to sample a GPU, `hz` times a second, in a thread of its own.

    `device` is its UUID (with or without "GPU-"), its PCI bus id, or its index as the driver
    counts, which CUDA_VISIBLE_DEVICES does not change: torch's index 0 may be another card, its
    UUID never is. `clock` gives the seconds since the process began.
    """
    try:
        return NvmlSensors(_Driver(device), hz, clock)
    except _NoDriver as error:
        return NullSensors(str(error))


class NvmlSensors:
    """Samples power and clock at `hz`, and reads the slower numbers once a second.

    A reading holds the means of the power and clock samples since the reading before it, and
    everything else as it is at `elapsed_seconds`. On most cards NVML's power is itself a mean over
    about the last second. device_used_bytes holds what the driver keeps for itself, too.
    """

    def __init__(self, driver: _Driver, hz: float, clock: Callable[[], float]) -> None:
        self._driver = driver
        self._clock = clock
        self._period_seconds = 1 / hz
        self._lock = threading.Lock()  # guards the readings, never held while the driver is asked
        self._readings: list[Sensor] = []
        self._stop = threading.Event()
        self.reason: str | None = None

        self._window_start = clock()
        self._powers_watts: list[float] = []
        self._clocks_hz: list[float] = []
        self._last_power: tuple[float, float] | None = None  # (seconds, watts)
        self._integral_joules = 0.0
        self._gap_seconds = 0.0
        self._energy_joules = 0.0  # as of the last reading of the counter; 0 without a counter
        self._integral_then_joules = 0.0
        self._counter_start_joules = self._driver.energy_counter_joules(self._window_start)
        self._sample(self._window_start)

        self._thread = threading.Thread(target=self._run, name="gpu-sensors", daemon=True)
        self._thread.start()

    @property
    def absent(self) -> Mapping[str, str]:
        absent = self._driver.absent()
        if "energy_counter" in absent:
            if "power_watts" in absent:
                absent["energy_joules"] = "neither the energy counter nor the power can be read"
            elif self._gap_seconds:
                absent["energy_gaps"] = (
                    f"the integral of power leaves out {self._gap_seconds:.1f} s without samples"
                )
        return absent

    def readings(self) -> list[Sensor]:
        with self._lock:
            drained, self._readings = self._readings, []
        return drained

    def close(self) -> list[Sensor]:
        self._stop.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self.reason = f"the driver has not answered since {self._window_start:.1f} s"
        else:
            self._driver.close()
        return self.readings()

    def _run(self) -> None:
        due = self._window_start
        while True:
            now = self._clock()
            due = max(due + self._period_seconds, now)  # samples that were missed stay missed
            stopping = self._stop.wait(due - now)
            now = self._clock()
            self._sample(now)
            full = now - self._window_start >= 1 - self._period_seconds / 2
            if full or stopping or self._driver.lost is not None:
                self._read(now)
            if stopping or self.reason is not None:
                return

    def _sample(self, now: float) -> None:
        clock_hz = self._driver.sm_clock_hz(now)
        if clock_hz is not None:
            self._clocks_hz.append(clock_hz)
        power_watts = self._driver.power_watts(now)
        if power_watts is None:
            return
        self._powers_watts.append(power_watts)
        if self._last_power is not None:
            then, before_watts = self._last_power
            if now - then <= _GAP_PERIODS * self._period_seconds:
                self._integral_joules += (now - then) * (before_watts + power_watts) / 2
            else:
                self._gap_seconds += now - then
        self._last_power = (now, power_watts)

    def _read(self, now: float) -> None:
        driver = self._driver
        energy_joules, by_counter = self._energy(now)
        reading = Sensor(
            elapsed_seconds=now,
            power_watts=fmean(self._powers_watts) if self._powers_watts else None,
            energy_joules=energy_joules,
            energy_source=None
            if energy_joules is None
            else ("counter" if by_counter else "integral"),
            power_limit_watts=driver.power_limit_watts(now),
            temperature_celsius=driver.temperature_celsius(now),
            sm_clock_hz=fmean(self._clocks_hz) if self._clocks_hz else None,
            utilization=driver.utilization(now),
            device_used_bytes=driver.device_used_bytes(now),
            process_used_bytes=driver.process_used_bytes(now),
        )
        if any(getattr(reading, name) is not None for name in MEASURED):
            with self._lock:
                self._readings.append(reading)
        else:
            self.reason = f"the driver gives no number any more, from {now:.1f} s on"
        if driver.lost is not None:
            self.reason = driver.lost
        self._window_start = now
        self._powers_watts, self._clocks_hz = [], []

    def _energy(self, now: float) -> tuple[float | None, bool]:
        """Joules since the start, and whether the driver's counter counted them."""
        counter_joules = self._driver.energy_counter_joules(now)
        if counter_joules is not None and self._counter_start_joules is not None:
            self._energy_joules = counter_joules - self._counter_start_joules
            self._integral_then_joules = self._integral_joules
            return self._energy_joules, True
        if self._powers_watts:
            # From the last counter reading, or from the start, on by the integral.
            return self._energy_joules + self._integral_joules - self._integral_then_joules, False
        return None, False


@dataclass(frozen=True)
class DriverInfo:
    """A GPU as the driver describes it; None where it does not, and `absent` says why."""

    name: str | None = None
    driver_version: str | None = None
    total_bytes: int | None = None
    max_sm_clock_hz: float | None = None
    """the highest the card may be set to, above the boost clock of its datasheet"""
    power_limit_watts: float | None = None
    used_by_others_bytes: int | None = None
    """what this process cannot have: in use by other processes, or kept by the driver; where the
    driver cannot tell processes apart, this process counts among the others, so ask early"""
    absent: dict[str, str] = field(default_factory=dict)


def driver_info(device: str | int) -> DriverInfo:
    """Describe a GPU, named as in open_sensors, as the driver sees it now."""
    try:
        driver = _Driver(device)
    except _NoDriver as error:
        names = [name for name in DriverInfo.__dataclass_fields__ if name != "absent"]
        return DriverInfo(absent=dict.fromkeys(names, str(error)))
    used_bytes = driver.device_used_bytes(None)
    own_bytes = driver.process_used_bytes(None) or 0
    info = DriverInfo(
        name=driver.name(),
        driver_version=driver.driver_version(),
        total_bytes=driver.total_bytes(),
        max_sm_clock_hz=driver.max_sm_clock_hz(),
        power_limit_watts=driver.power_limit_watts(None),
        used_by_others_bytes=None if used_bytes is None else used_bytes - own_bytes,
        absent=driver.absent(),
    )
    driver.close()
    if used_bytes is None:
        info.absent["used_by_others_bytes"] = info.absent.pop("device_used_bytes")
    info.absent.pop("process_used_bytes", None)
    return info


class _NoDriver(Exception):
    """There is no driver, or it does not know the device; the message is the reason."""


class _Driver:
    """One GPU, asked one number at a time; a number that failed once is not asked for again."""

    def __init__(self, device: str | int) -> None:
        try:
            import pynvml
        except ImportError:
            raise _NoDriver("the Python package nvidia-ml-py is not installed") from None
        self._nvml: ModuleType = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise _NoDriver("no NVIDIA driver: its library NVML was not found") from None
        except pynvml.NVMLError as error:
            raise _NoDriver(f"no NVIDIA driver that answers: {error}") from None
        try:
            self._handle = _find(pynvml, device)
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            raise _NoDriver(f"the NVIDIA driver has no device {device}: {error}") from None
        self._failed: dict[str, str] = {}
        self._given: set[str] = set()
        self._unlisted: str | None = None
        self.lost: str | None = None

    def absent(self) -> dict[str, str]:
        absent = {} if self.lost is None else dict.fromkeys(MEASURED, self.lost)
        if self._unlisted is not None:
            absent.setdefault("process_used_bytes", self._unlisted)
        return absent | dict(self._failed)

    def close(self) -> None:
        if self.lost is None:
            self._nvml.nvmlShutdown()

    def power_watts(self, now: float) -> float | None:
        return self._ask("power_watts", now, "nvmlDeviceGetPowerUsage", scale=1e-3)

    def energy_counter_joules(self, now: float) -> float | None:
        return self._ask("energy_counter", now, "nvmlDeviceGetTotalEnergyConsumption", scale=1e-3)

    def power_limit_watts(self, now: float | None) -> float | None:
        return self._ask("power_limit_watts", now, "nvmlDeviceGetEnforcedPowerLimit", scale=1e-3)

    def temperature_celsius(self, now: float) -> float | None:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return self._ask("temperature_celsius", now, "nvmlDeviceGetTemperature", sensor)

    def sm_clock_hz(self, now: float) -> float | None:
        clock = self._nvml.NVML_CLOCK_SM
        return self._ask("sm_clock_hz", now, "nvmlDeviceGetClockInfo", clock, scale=1e6)

    def max_sm_clock_hz(self) -> float | None:
        clock = self._nvml.NVML_CLOCK_SM
        return self._ask("max_sm_clock_hz", None, "nvmlDeviceGetMaxClockInfo", clock, scale=1e6)

    def utilization(self, now: float) -> float | None:
        rates = self._answer("utilization", now, "nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def device_used_bytes(self, now: float | None) -> int | None:
        memory = self._answer("device_used_bytes", now, "nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def total_bytes(self) -> int | None:
        memory = self._answer("total_bytes", None, "nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def process_used_bytes(self, now: float | None) -> int | None:
        processes = self._answer("process_used_bytes", now, "nvmlDeviceGetComputeRunningProcesses")
        if processes is None:
            return None
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        if not own or None in own:
            # Not final: the process is listed from its first use of the GPU on.
            self._unlisted = (
                f"the driver does not say what process {os.getpid()} uses: it has not used the "
                "GPU yet, or runs in a container that hides its number"
            )
            return None
        self._unlisted = None
        return int(sum(own))

    def name(self) -> str | None:
        return self._text("name", "nvmlDeviceGetName", self._handle)

    def driver_version(self) -> str | None:
        return self._text("driver_version", "nvmlSystemGetDriverVersion")

    def _text(self, field: str, function: str, *arguments: object) -> str | None:
        try:
            return str(getattr(self._nvml, function)(*arguments))
        except self._nvml.NVMLError as error:
            self._failed[field] = f"the driver does not give it: {error}"
            return None

    def _ask(
        self, field: str, now: float | None, function: str, *arguments: object, scale: float = 1.0
    ) -> float | None:
        answer = self._answer(field, now, function, *arguments)
        return None if answer is None else answer * scale

    def _answer(self, field: str, now: float | None, function: str, *arguments: object) -> Any:
        """What NVML's function says of the device, or None for good once it failed."""
        if self.lost is not None or field in self._failed:
            return None
        try:
            answer = getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            since = f" from {now:.1f} s on" if now is not None and field in self._given else ""
            self._failed[field] = f"the driver does not give it{since}: {error}"
            if error.value in _fatal(self._nvml):
                self.lost = f"the driver lost the GPU{since}: {error}"
            return None
        self._given.add(field)
        return answer


def _fatal(nvml: ModuleType) -> tuple[int, ...]:
    """The errors after which no other number can be expected either."""
    return (
        nvml.NVML_ERROR_GPU_IS_LOST,
        nvml.NVML_ERROR_RESET_REQUIRED,
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    )


def _find(nvml: ModuleType, device: str | int) -> Any:
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    if re.fullmatch(r"([0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]", device):
        return nvml.nvmlDeviceGetHandleByPciBusId(device)
    # torch leaves out the prefix that NVML asks for.
    uuid = device if device.startswith(("GPU-", "MIG-")) else f"GPU-{device}"
    return nvml.nvmlDeviceGetHandleByUUID(uuid)

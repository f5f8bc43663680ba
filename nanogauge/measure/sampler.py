"""The thread that samples the GPU beside the training loop.

Nothing that happens to the driver is raised into the loop, and the loop never waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nanogauge.measure import rapl
from nanogauge.measure.absences import Absences, Change
from nanogauge.measure.energy import EnergySum
from nanogauge.measure.nvml import Driver, NoDriver
from nanogauge.records import Sensor

_NOT_MEASURED = ("kind", "elapsed_seconds", "energy_source", "gap_seconds")
MEASURED = tuple(name for name in Sensor.model_fields if name not in _NOT_MEASURED)
"""the fields of a reading that are measured; `absent` speaks of them by these names"""
_OF_GPU = tuple(name for name in MEASURED if name != rapl.FIELD)
_OF_POWER = ("power_min_watts", "power_max_watts", "integral_joules")

_GAP_PERIODS = 5
"""samples further apart than so many periods have an unknown power between them"""
_HANG_SECONDS = 3.0
"""a driver that answers nothing for so long is said to hang"""
_CLOSE_SECONDS = 1.0
"""a driver that does not answer for so long at the end is left alone"""


@dataclass(frozen=True)
class PowerSpread:
    """Samples of power since the last time somebody asked."""

    mean_watts: float
    min_watts: float
    max_watts: float
    n: int


class Sampler:
    """Samples power at `hz`, and reads the other numbers once a second.

    A reading holds the mean of the power samples since the reading before it, and everything else
    as it is at `elapsed_seconds`. On most cards NVML's power is itself a mean over about the last
    second. device_used_bytes holds what the driver keeps for itself, too. Without a GPU, or without
    its driver, the energy of the processor is read alone.

    Args:
        device: the GPU as in Driver; None reads none.
        hz: samples per second.
        clock: seconds since the process began.
        rapl_root: the folder of the processor's energy counters; None reads none.
    """

    def __init__(
        self,
        device: str | int | None,
        hz: float,
        clock: Callable[[], float],
        rapl_root: Path | None,
    ) -> None:
        self.cpu_seconds = 0.0
        """what the sampling cost so far, in seconds of one core, without opening the driver"""
        self._hz = hz
        self._clock = clock
        self._absences = Absences()
        self._driver: Driver | None = None
        self._rapl: rapl.Rapl | None = None
        self._energy: EnergySum | None = None
        self._lock = threading.Lock()  # guards the next two, never held while the driver is asked
        self._readings: list[Sensor] = []
        self._spread: tuple[int, float, float, float] | None = None  # n, sum, least, most
        self._opened = threading.Event()
        self._running = threading.Lock()  # let go to stop the thread; an Event wakes it dearer
        self._running.acquire()
        self._asking_since: float | None = clock()  # None while nothing is asked of the driver

        self._window_start = 0.0
        self._powers_watts: list[float] = []
        self._gap_seconds = 0.0  # as of the last reading, whether there was a line to tell it
        self._told_gap_seconds = 0.0
        arguments = (device, rapl_root)
        self._thread = threading.Thread(
            target=self._run, name="sensors", args=arguments, daemon=True
        )
        self._thread.start()

    def wait_opened(self, seconds: float) -> bool:
        """Wait at most so long for the driver to be found, or not; whether there is an answer."""
        return self._opened.wait(seconds)

    @property
    def has_gpu(self) -> bool:
        """Whether a driver that knows the GPU was found."""
        return self._driver is not None

    @property
    def absent(self) -> Mapping[str, str]:
        reasons = self._reasons()
        whole, gpu = reasons.pop("driver", None), reasons.pop("gpu", None)
        absent: dict[str, str] = {}
        if whole is not None:
            absent = dict.fromkeys(MEASURED, whole)
        elif gpu is not None:
            absent = dict.fromkeys(_OF_GPU, gpu)
        elif "power_watts" in reasons:
            absent = dict.fromkeys(_OF_POWER, reasons["power_watts"])
            if "energy_counter" in reasons:
                why = "neither the energy counter nor the power can be read"
                absent["energy_joules"] = why
        if self._gap_seconds:
            gap = f"the integral of power leaves out {self._gap_seconds:.1f} s without samples"
            absent["energy_gaps"] = gap
        return absent | reasons

    @property
    def reason(self) -> str | None:
        reasons = self._reasons()
        no_processor = self._rapl is None or rapl.FIELD in reasons
        return reasons.get("driver") or (reasons.get("gpu") if no_processor else None)

    def changes(self) -> list[Change]:
        self._notice_hang()
        return self._absences.drain()

    def readings(self) -> list[Sensor]:
        with self._lock:
            drained, self._readings = self._readings, []
        return drained

    def power_since_last(self) -> PowerSpread | None:
        with self._lock:
            spread, self._spread = self._spread, None
        if spread is None:
            return None
        n, total, least, most = spread
        return PowerSpread(round(total / n, 3), round(least, 3), round(most, 3), n)

    def close(self) -> list[Sensor]:
        if self._running.locked():
            self._running.release()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell_hang(self._asking_since)
        return self.readings()

    def _reasons(self) -> dict[str, str]:
        self._notice_hang()
        return self._absences.reasons()

    def _notice_hang(self) -> None:
        since = self._asking_since
        if since is not None and self._clock() - since > _HANG_SECONDS:
            self._tell_hang(since)

    def _tell_hang(self, since: float | None) -> None:
        now = self._clock() if since is None else since
        self._absences.missing("driver", now, "the driver does not answer")

    def _run(self, device: str | int | None, rapl_root: Path | None) -> None:
        try:
            self._open(device, rapl_root)
            if self._driver is not None or (self._rapl is not None and self._rapl.there):
                self._sample_until_stopped()
        except Exception as error:
            # Whatever it is, it must end neither the run nor unheard.
            self._absences.missing("driver", self._clock(), "the sampling broke off", repr(error))
        finally:
            self._asking_since = None
            self._opened.set()

    def _open(self, device: str | int | None, rapl_root: Path | None) -> None:
        now = self._clock()
        if device is None:
            self._absences.missing("gpu", now, "no GPU")
        else:
            try:
                self._driver = Driver(device, self._absences)
            except NoDriver as error:
                self._absences.missing("gpu", now, str(error))
        now = self._window_start = self._clock()
        if rapl_root is None:
            self._absences.missing(rapl.FIELD, now, "it is not asked for")
        else:
            self._rapl = rapl.Rapl(rapl_root, self._absences, now)
        if self._driver is not None:
            counter = self._driver.energy_counter_joules(now)
            self._energy = EnergySum(now, counter, _GAP_PERIODS / self._hz)
            self._sample(self._driver, self._energy, now)
        self._absences.present("driver", self._clock())
        self._opened.set()

    def _sample_until_stopped(self) -> None:
        # The processor's energy alone is read once a second.
        period = 1 / self._hz if self._driver is not None else 1.0
        due = self._window_start
        now = self._clock()
        opening_seconds = time.thread_time()
        while True:
            due = max(due + period, now)  # samples that were missed stay missed
            self._asking_since = None
            stopping = self._running.acquire(timeout=due - now)
            now = self._asking_since = self._clock()
            full = now - self._window_start >= 1 - period / 2
            if self._tick(now) or full or stopping:
                self._read(now, stopping)
                self._absences.present("driver", now)
                self.cpu_seconds = time.thread_time() - opening_seconds
            if stopping:
                break
        if self._driver is not None:
            self._driver.close()

    def _tick(self, now: float) -> bool:
        """One sample of what changes fast; whether the GPU was lost on it."""
        driver, energy = self._driver, self._energy
        if driver is None or energy is None:
            return False
        if driver.lost and driver.reopen(now):
            energy.forget_counter()
        was_lost = driver.lost
        self._sample(driver, energy, now)
        return driver.lost and not was_lost

    def _sample(self, driver: Driver, energy: EnergySum, now: float) -> None:
        watts = driver.power_watts(now)
        if watts is not None:
            energy.add_power(now, watts)
            self._powers_watts.append(watts)
            with self._lock:
                n, total, least, most = self._spread or (0, 0.0, watts, watts)
                self._spread = (n + 1, total + watts, min(least, watts), max(most, watts))

    def _read(self, now: float, closing: bool) -> None:
        values: dict[str, Any] = {}
        if self._driver is not None and self._energy is not None:
            values = self._read_gpu(self._driver, self._energy, now)
            self._gap_seconds = round(self._energy.gap_seconds(now), 6)
            if not any(value is not None for value in values.values()) and not self._driver.lost:
                self._driver.lose(now)
        joules = None if self._rapl is None else self._rapl.joules(now)
        measured = joules is not None or any(value is not None for value in values.values())
        # The last line tells of a gap that nothing ended.
        if measured or (closing and self._gap_seconds > self._told_gap_seconds):
            reading = Sensor(
                elapsed_seconds=round(now, 6),
                gap_seconds=self._gap_seconds or None,
                cpu_package_joules=joules,
                **values,
            )
            self._told_gap_seconds = self._gap_seconds
            with self._lock:
                self._readings.append(reading)
        self._window_start = now
        self._powers_watts = []

    def _read_gpu(self, driver: Driver, energy: EnergySum, now: float) -> dict[str, Any]:
        powers = self._powers_watts
        energy_joules, energy_source = energy.read(now, driver.energy_counter_joules(now))
        return {
            "power_watts": _rounded(_mean(powers), 3),
            "power_min_watts": _rounded(min(powers, default=None), 3),
            "power_max_watts": _rounded(max(powers, default=None), 3),
            "energy_joules": _rounded(energy_joules, 2),
            "energy_source": energy_source,
            "integral_joules": _rounded(energy.integral_joules(now), 2),
            "power_limit_watts": _rounded(driver.power_limit_watts(now), 3),
            "temperature_celsius": driver.temperature_celsius(now),
            "fan": _rounded(driver.fan(now), 3),
            "sm_clock_hz": _rounded(driver.sm_clock_hz(now), 0),
            "memory_clock_hz": _rounded(driver.memory_clock_hz(now), 0),
            "utilization": _rounded(driver.utilization(now), 3),
            "throttle": driver.throttle(now),
            "pcie_generation": driver.pcie_generation(now),
            "pcie_width": driver.pcie_width(now),
            "device_used_bytes": driver.device_used_bytes(now),
            "process_used_bytes": driver.process_used_bytes(now),
        }


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)

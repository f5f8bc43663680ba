"""Sampling of one GPU, or of all GPUs of a run on this machine together.

For several GPUs power, its limit and energy are sums and utilization is the mean; every other field is of the GPU with
the worst value: the hottest, the fullest, the slowest. A field that one GPU does not give is None for all, and the
reason names the GPU by its position, from 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from nanogauge.measure.nvml import Absences, Change, Driver, NoDriver


class EnergySum:
    """Energy since the start in joules, by the driver's counter and by integration of power.

    Both totals are monotonic; gaps without samples are excluded.

    Args:
        now: the start, in seconds.
        counter_joules: the driver's counter at the start; None if it cannot be read. longest_gap: seconds between power
        samples beyond which the power between is unknown.
    """

    def __init__(self, now: float, counter_joules: float | None, longest_gap: float) -> None:
        self._start = now
        self._longest_gap = longest_gap
        self._last_power: tuple[float, float] | None = None  # (seconds, watts)
        self._integral_joules = 0.0
        self._gap_seconds = 0.0
        # As of the last reading of the counter, or the start:
        self._counter_joules = counter_joules
        self._joules = 0.0
        self._integral_then = 0.0
        self._then = now
        self._highest_joules = 0.0

    def add_power(self, now: float, watts: float) -> None:
        """Add a power sample; power is interpolated linearly between neighbours."""
        if self._last_power is not None:
            then, before_watts = self._last_power
        else:
            then, before_watts = self._start, watts
        if now - then > self._longest_gap:
            self._gap_seconds += now - then
        else:
            self._integral_joules += (now - then) * (before_watts + watts) / 2
        self._last_power = (now, watts)

    def read(
        self, now: float, counter_joules: float | None
    ) -> tuple[float, Literal["counter", "integral"]] | tuple[None, None]:
        """Return the energy since the start and the source of its last part; None if unknown.

        While the counter is absent, or when it fell, the total continues by the integral.
        """
        sampled = self._last_power is not None and now - self._last_power[0] <= self._longest_gap
        since_then = self._integral_joules - self._integral_then
        source: Literal["counter", "integral"] = "counter"
        if counter_joules is None:
            if not sampled:
                return None, None
            joules, source = self._joules + since_then, "integral"
        else:
            before = self._counter_joules
            if before is not None and counter_joules >= before:
                joules = self._joules + counter_joules - before
            else:
                joules = self._joules + since_then
                if sampled:
                    source = "integral"
                if self._last_power is None:
                    self._gap_seconds += now - self._then
            self._joules, self._counter_joules = joules, counter_joules
            self._integral_then, self._then = self._integral_joules, now
        self._highest_joules = max(self._highest_joules, joules)
        return self._highest_joules, source

    def integral_joules(self, now: float) -> float | None:
        """Return the energy since the start by integration of power; None without samples."""
        if self._last_power is None or now - self._last_power[0] > self._longest_gap:
            return None
        return self._integral_joules

    def gap_seconds(self, now: float) -> float:
        """Return the time since the start without power samples, including an open gap.

        For a GPU that never reports power: the time in which its counter lost count.
        """
        if self._last_power is None:
            return self._gap_seconds
        waiting = now - self._last_power[0]
        return self._gap_seconds + (waiting if waiting > self._longest_gap else 0.0)


_READ = (
    *("power_limit_watts", "temperature_celsius", "fan", "sm_clock_hz", "memory_clock_hz", "pcie_generation"),
    *("pcie_width", "utilization", "throttle", "device_used_bytes"),
)
"""Fields of a reading that nvml.Driver.read gives."""
_COMBINED: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(("energy_joules", "integral_joules", "power_limit_watts"), sum),
    **dict.fromkeys(("temperature_celsius", "fan", "device_used_bytes", "process_used_bytes"), max),
    **dict.fromkeys(("sm_clock_hz", "memory_clock_hz", "pcie_generation", "pcie_width"), min),
    "utilization": fmean,
    "energy_source": max,  # "integral" if one is
    "throttle": lambda lists: list(dict.fromkeys(word for words in lists for word in words)),
}
"""Field -> function that combines the values of several GPUs into one."""
_DIGITS = {
    **dict.fromkeys(("power_watts", "power_min_watts", "power_max_watts", "power_limit_watts"), 3),
    **dict.fromkeys(("energy_joules", "integral_joules"), 2),
    **dict.fromkeys(("fan", "utilization"), 3),
    **dict.fromkeys(("sm_clock_hz", "memory_clock_hz"), 0),
}


@dataclass(frozen=True)
class WatchedGpu:
    """A GPU to sample."""

    device: str | int
    """UUID, PCI bus id or index, as for nvml.Driver."""
    pid: int | None = None
    """Process whose memory on it is measured; None for this one."""


class _Gpu:
    """State of one sampled GPU: its driver, its energy and its absent fields."""

    def __init__(self, watched: WatchedGpu, label: str, longest_gap: float) -> None:
        self.absences = Absences(label)
        self.driver: Driver | None = None
        self._watched = watched
        self._longest_gap = longest_gap
        self._energy: EnergySum | None = None

    def open(self, clock: Callable[[], float]) -> None:
        try:
            driver = Driver(self._watched.device, self.absences, self._watched.pid)
        except NoDriver as error:
            self.absences.missing("gpu", clock(), str(error))
            return
        now = clock()
        self._energy = EnergySum(now, driver.read("energy_counter", now), self._longest_gap)
        self.driver = driver

    def sample(self, now: float) -> float | None:
        """Sample the power in watts."""
        if self.driver is None or self._energy is None:
            return None
        watts: float | None = self.driver.read("power_watts", now)
        if watts is not None:
            self._energy.add_power(now, watts)
        return watts

    def read(self, now: float) -> dict[str, Any]:
        """Read all fields but power."""
        driver, energy = self.driver, self._energy
        if driver is None or energy is None:
            return {}
        joules, source = energy.read(now, driver.read("energy_counter", now))
        return {
            "energy_joules": joules,
            "energy_source": source,
            "integral_joules": energy.integral_joules(now),
            "process_used_bytes": driver.process_used_bytes(now),
            **{name: driver.read(name, now) for name in _READ},
        }

    def gap_seconds(self, now: float) -> float:
        return 0.0 if self._energy is None else self._energy.gap_seconds(now)


class GpuGroup:
    """GPUs that are sampled together. Only `reasons` and `changes` are thread-safe."""

    def __init__(self, watched: Sequence[WatchedGpu], longest_gap: float) -> None:
        several = len(watched) > 1
        self._gpus = [_Gpu(one, f"GPU {number}" if several else "", longest_gap) for number, one in enumerate(watched)]
        self._powers_watts: list[float] = []  # totals since the last reading

    def open(self, clock: Callable[[], float]) -> None:
        for gpu in self._gpus:
            gpu.open(clock)

    @property
    def found(self) -> bool:
        """True if the driver recognizes at least one of the GPUs."""
        return any(gpu.driver is not None for gpu in self._gpus)

    def sample(self, now: float) -> float | None:
        """Sample the total power in watts; None unless every GPU gives it."""
        powers = [gpu.sample(now) for gpu in self._gpus]
        known = [watts for watts in powers if watts is not None]
        if not known or len(known) < len(powers):
            return None
        self._powers_watts.append(sum(known))
        return sum(known)

    def read(self, now: float) -> dict[str, Any]:
        """Return the fields of a reading since the previous one; empty if no GPU was found."""
        if not self.found:
            return {}
        powers, self._powers_watts = self._powers_watts, []
        readings = [gpu.read(now) for gpu in self._gpus]
        values = {
            "power_watts": fmean(powers) if powers else None,
            "power_min_watts": min(powers, default=None),
            "power_max_watts": max(powers, default=None),
            **(readings[0] if len(readings) == 1 else _combine(readings)),
        }
        for name, digits in _DIGITS.items():
            if values[name] is not None:
                values[name] = round(values[name], digits)
        return values

    def gap_seconds(self, now: float) -> float:
        """Return the gap_seconds of EnergySum of the GPU with the most."""
        return max(gpu.gap_seconds(now) for gpu in self._gpus)

    def reasons(self) -> dict[str, str]:
        """Return why fields are absent: the reason of the first GPU that lacks each."""
        reasons: dict[str, str] = {}
        for gpu in self._gpus:
            reasons = gpu.absences.reasons() | reasons
        return reasons

    def changes(self) -> list[Change]:
        return [change for gpu in self._gpus for change in gpu.absences.drain()]

    def close(self) -> None:
        for gpu in self._gpus:
            if gpu.driver is not None:
                gpu.driver.close()


def _combine(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the readings of several GPUs into one."""

    def combined(name: str, combine: Callable[[list[Any]], Any]) -> Any:
        values = [reading.get(name) for reading in readings]
        return None if None in values else combine(values)

    return {
        **{name: combined(name, combine) for name, combine in _COMBINED.items()},
        "hottest_card": combined("temperature_celsius", lambda v: v.index(max(v))),
        "fullest_card": combined("device_used_bytes", lambda v: v.index(max(v))),
        "slowest_card": combined("sm_clock_hz", lambda v: v.index(min(v))),
    }

"""The cards that are sampled together: one, or those of all processes of a run on this machine.

Of several cards power, its limit and energy are sums, utilisation is the mean; of everything else
the card that is worst off is told: the hottest, the fullest, the slowest. A number that one of them
does not give is None for all of them, and the reason names the card, counted from 0 in the order in
which they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from nanogauge.measure.nvml import Absences, Change, Driver, NoDriver


class EnergySum:
    """Joules since the start: neither sum ever falls, and none counts what nobody saw.

    Args:
        now: the start, in seconds.
        counter_joules: the driver's counter then; None where it cannot be read.
        longest_gap: samples of power further apart than so many seconds have an unknown power
            between them.
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
        self._told_joules = 0.0

    def add_power(self, now: float, watts: float) -> None:
        """A sample; the power between two neighbours is taken to be on the line between them."""
        if self._last_power is not None:
            then, before_watts = self._last_power
        else:
            then, before_watts = self._start, watts
        if now - then > self._longest_gap:
            self._gap_seconds += now - then
        else:
            self._integral_joules += (now - then) * (before_watts + watts) / 2
        self._last_power = (now, watts)

    def forget_counter(self) -> None:
        """The driver began anew: nobody knows what its counter counted meanwhile."""
        self._counter_joules = None

    def read(
        self, now: float, counter_joules: float | None
    ) -> tuple[float, Literal["counter", "integral"]] | tuple[None, None]:
        """Joules since the start, and who counted the last of them; None where nobody did.

        Where the counter fell, or is not there, the sum goes on by the integral.
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
        self._told_joules = max(self._told_joules, joules)
        return self._told_joules, source

    def integral_joules(self, now: float) -> float | None:
        """Joules since the start by the samples alone; None while there are none."""
        if self._last_power is None or now - self._last_power[0] > self._longest_gap:
            return None
        return self._integral_joules

    def gap_seconds(self, now: float) -> float:
        """Time since the start in which no sample of power was near; an open gap counts to `now`.

        For a card that never tells its power: the time in which its counter lost count.
        """
        if self._last_power is None:
            return self._gap_seconds
        waiting = now - self._last_power[0]
        return self._gap_seconds + (waiting if waiting > self._longest_gap else 0.0)


_SUMMED = ("energy_joules", "integral_joules", "power_limit_watts")
_HIGHEST = ("temperature_celsius", "fan", "device_used_bytes", "process_used_bytes")
_LOWEST = ("sm_clock_hz", "memory_clock_hz", "pcie_generation", "pcie_width")
_MEAN = ("utilization",)


@dataclass(frozen=True)
class Watched:
    """A card to sample."""

    device: str | int
    """as nvml.Driver names it"""
    pid: int | None = None
    """the process whose memory on it is told; None for this one"""


class _Card:
    """One card: its driver, its energy, and what of it is absent."""

    def __init__(self, watched: Watched, whose: str, longest_gap: float) -> None:
        self.absences = Absences(whose)
        self.driver: Driver | None = None
        self._watched = watched
        self._longest_gap = longest_gap
        self._energy: EnergySum | None = None
        self._gave_power = False  # since the last reading

    def open(self, clock: Callable[[], float]) -> None:
        try:
            driver = Driver(self._watched.device, self.absences, self._watched.pid)
        except NoDriver as error:
            self.absences.missing("gpu", clock(), str(error))
            return
        now = clock()
        self._energy = EnergySum(now, driver.energy_counter_joules(now), self._longest_gap)
        self.driver = driver

    def tick(self, now: float) -> tuple[float | None, bool]:
        """Its power; and whether it was lost over this."""
        if self.driver is None or self._energy is None:
            return None, False
        if self.driver.lost and self.driver.reopen(now):
            self._energy.forget_counter()
        was_lost = self.driver.lost
        watts = self.driver.power_watts(now)
        if watts is not None:
            self._energy.add_power(now, watts)
            self._gave_power = True
        return watts, self.driver.lost and not was_lost

    def read(self, now: float) -> dict[str, Any]:
        """All but power; a card that has not even given that since the last reading is lost."""
        driver, energy = self.driver, self._energy
        if driver is None or energy is None:
            return {}
        energy_joules, energy_source = energy.read(now, driver.energy_counter_joules(now))
        values = {
            "energy_joules": energy_joules,
            "energy_source": energy_source,
            "integral_joules": energy.integral_joules(now),
            "power_limit_watts": driver.power_limit_watts(now),
            "temperature_celsius": driver.temperature_celsius(now),
            "fan": rounded(driver.fan(now), 3),
            "sm_clock_hz": rounded(driver.sm_clock_hz(now), 0),
            "memory_clock_hz": rounded(driver.memory_clock_hz(now), 0),
            "utilization": rounded(driver.utilization(now), 3),
            "throttle": driver.throttle(now),
            "pcie_generation": driver.pcie_generation(now),
            "pcie_width": driver.pcie_width(now),
            "device_used_bytes": driver.device_used_bytes(now),
            "process_used_bytes": driver.process_used_bytes(now),
        }
        silent = all(value is None for value in values.values()) and not self._gave_power
        if silent and not driver.lost:
            driver.lose(now)
        self._gave_power = False
        return values

    def gap_seconds(self, now: float) -> float:
        return 0.0 if self._energy is None else self._energy.gap_seconds(now)


class Cards:
    """Samples some cards. Only `reasons` and `changes` may be asked by another thread.

    Args:
        watched: at least one.
        longest_gap: as of EnergySum, in seconds.
    """

    def __init__(self, watched: Sequence[Watched], longest_gap: float) -> None:
        several = len(watched) > 1
        self._cards = [
            _Card(one, f"card {number}" if several else "", longest_gap)
            for number, one in enumerate(watched)
        ]
        self._powers_watts: list[float] = []  # of all cards together, since the last reading

    def open(self, clock: Callable[[], float]) -> None:
        """Find their drivers."""
        for card in self._cards:
            card.open(clock)

    @property
    def found(self) -> bool:
        """Whether a driver that knows one of them was found."""
        return any(card.driver is not None for card in self._cards)

    def tick(self, now: float) -> tuple[float | None, bool]:
        """One sample of the power of all, in W; and whether one of them was lost over this."""
        ticks = [card.tick(now) for card in self._cards]
        total = _sum([watts for watts, _ in ticks])
        if total is not None:
            self._powers_watts.append(total)
        return total, any(lost for _, lost in ticks)

    def read(self, now: float) -> dict[str, Any]:
        """The fields of a reading since the one before; empty where no card was found."""
        if not self.found:
            return {}
        powers, self._powers_watts = self._powers_watts, []
        readings = [card.read(now) for card in self._cards]
        values = readings[0] if len(readings) == 1 else _together(readings)
        return {
            "power_watts": rounded(fmean(powers) if powers else None, 3),
            "power_min_watts": rounded(min(powers, default=None), 3),
            "power_max_watts": rounded(max(powers, default=None), 3),
            **values,
            "energy_joules": rounded(values["energy_joules"], 2),
            "integral_joules": rounded(values["integral_joules"], 2),
            "power_limit_watts": rounded(values["power_limit_watts"], 3),
        }

    def gap_seconds(self, now: float) -> float:
        """As of EnergySum: of the card that misses most."""
        return max(card.gap_seconds(now) for card in self._cards)

    def reasons(self) -> dict[str, str]:
        """Why fields are absent, by their names: what the first card that lacks one says of it."""
        found: dict[str, str] = {}
        for card in self._cards:
            found = card.absences.reasons() | found
        return found

    def changes(self) -> list[Change]:
        return [change for card in self._cards for change in card.absences.drain()]

    def close(self) -> None:
        for card in self._cards:
            if card.driver is not None:
                card.driver.close()


def _together(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """What several cards give as one reading."""

    def all_of(name: str) -> list[Any] | None:
        values = [reading.get(name) for reading in readings]
        return None if None in values else values

    def card_with(choose: Callable[[list[Any]], Any], name: str) -> int | None:
        values = all_of(name)
        return None if values is None else values.index(choose(values))

    combined: dict[str, Any] = {}
    ways: dict[tuple[str, ...], Callable[[list[Any]], Any]]
    ways = {_SUMMED: sum, _HIGHEST: max, _LOWEST: min, _MEAN: fmean}
    for names, combine in ways.items():
        for name in names:
            values = all_of(name)
            combined[name] = None if values is None else combine(values)
    sources, reasons = all_of("energy_source"), all_of("throttle")
    combined["energy_source"] = None if sources is None else max(sources)  # integral if one is
    combined["throttle"] = None
    if reasons is not None:
        combined["throttle"] = list(dict.fromkeys(word for words in reasons for word in words))
    combined["hottest_card"] = card_with(max, "temperature_celsius")
    combined["fullest_card"] = card_with(max, "device_used_bytes")
    combined["slowest_card"] = card_with(min, "sm_clock_hz")
    return combined


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)

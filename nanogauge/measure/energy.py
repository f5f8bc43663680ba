"""Energy of a run from two witnesses: the driver's counter, and the sampled power."""

from __future__ import annotations

from typing import Literal


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

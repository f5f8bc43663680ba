"""The thread that samples the GPU, or several of them, beside the training loop.

Nothing that happens to the driver is raised into the loop, and the loop never waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanogauge.measure.absences import Absences, Change
from nanogauge.measure.cards import Cards, Watched
from nanogauge.records import Sensor

_NOT_MEASURED = ("kind", "elapsed_seconds", "energy_source", "gap_seconds")
_OF_SEVERAL = ("hottest_card", "fullest_card", "slowest_card")
MEASURED = tuple(n for n in Sensor.model_fields if n not in (*_NOT_MEASURED, *_OF_SEVERAL))
"""the fields of a reading that are measured; `absent` speaks of them by these names"""
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
    second. device_used_bytes holds what the driver keeps for itself, too.

    Args:
        cards: what is sampled together, at least one.
        hz: samples per second.
        clock: seconds since the process began.
    """

    def __init__(self, cards: Sequence[Watched], hz: float, clock: Callable[[], float]) -> None:
        self.cpu_seconds = 0.0
        """what the sampling cost so far, in seconds of one core, without opening the driver"""
        self._hz = hz
        self._clock = clock
        self._absences = Absences()
        self._cards = Cards(cards, _GAP_PERIODS / hz)
        self._lock = threading.Lock()  # guards the next two, never held while the driver is asked
        self._readings: list[Sensor] = []
        self._spread: tuple[int, float, float, float] | None = None  # n, sum, least, most
        self._opened = threading.Event()
        self._running = threading.Lock()  # let go to stop the thread; an Event wakes it dearer
        self._running.acquire()
        self._asking_since: float | None = clock()  # None while nothing is asked of the driver

        self._window_start = 0.0
        self._gap_seconds = 0.0  # as of the last reading, whether there was a line to tell it
        self._told_gap_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)
        self._thread.start()

    def wait_opened(self, seconds: float) -> bool:
        """Wait at most so long for the driver to be found, or not; whether there is an answer."""
        return self._opened.wait(seconds)

    @property
    def has_gpu(self) -> bool:
        """Whether a driver that knows the GPU, or one of them, was found."""
        return self._cards.found

    @property
    def absent(self) -> Mapping[str, str]:
        reasons = self._reasons()
        whole, gpu = reasons.pop("driver", None), reasons.pop("gpu", None)
        absent: dict[str, str] = {}
        if lost := whole or gpu:
            absent = dict.fromkeys(MEASURED, lost)
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
        return reasons.get("driver") or reasons.get("gpu")

    def changes(self) -> list[Change]:
        self._notice_hang()
        return self._cards.changes() + self._absences.drain()

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
        return self._cards.reasons() | self._absences.reasons()

    def _notice_hang(self) -> None:
        since = self._asking_since
        if since is not None and self._clock() - since > _HANG_SECONDS:
            self._tell_hang(since)

    def _tell_hang(self, since: float | None) -> None:
        now = self._clock() if since is None else since
        self._absences.missing("driver", now, "the driver does not answer")

    def _run(self) -> None:
        try:
            self._open()
            if self.has_gpu:
                self._sample_until_stopped()
        except Exception as error:
            # Whatever it is, it must end neither the run nor unheard.
            self._absences.missing("driver", self._clock(), "the sampling broke off", repr(error))
        finally:
            self._asking_since = None
            self._opened.set()

    def _open(self) -> None:
        self._cards.open(self._clock)
        now = self._window_start = self._clock()
        self._tick(now)
        self._absences.present("driver", self._clock())
        self._opened.set()

    def _sample_until_stopped(self) -> None:
        period = 1 / self._hz
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
        self._cards.close()

    def _tick(self, now: float) -> bool:
        """One sample of what changes fast; whether a GPU was lost on it."""
        watts, lost = self._cards.tick(now)
        if watts is not None:
            with self._lock:
                n, total, least, most = self._spread or (0, 0.0, watts, watts)
                self._spread = (n + 1, total + watts, min(least, watts), max(most, watts))
        return lost

    def _read(self, now: float, closing: bool) -> None:
        values = self._cards.read(now)
        self._gap_seconds = round(self._cards.gap_seconds(now), 6)
        measured = any(value is not None for value in values.values())
        # The last line tells of a gap that nothing ended.
        if measured or (closing and self._gap_seconds > self._told_gap_seconds):
            reading = Sensor(
                elapsed_seconds=round(now, 6),
                gap_seconds=self._gap_seconds or None,
                **values,
            )
            self._told_gap_seconds = self._gap_seconds
            with self._lock:
                self._readings.append(reading)
        self._window_start = now

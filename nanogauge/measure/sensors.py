"""The GPU sensors of a training loop: a sampling thread that never blocks or fails the loop.

A measurement that is absent is None, and `reasons` holds why. No function waits for a driver that hangs, and no
error of the driver reaches the loop.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from nanogauge.measure.gpus import GpuGroup, WatchedGpu
from nanogauge.measure.nvml import Absences, Change, Driver, NoDriver
from nanogauge.schema import Sensor

_GAP_PERIODS = 5
"""Periods between power samples beyond which the power between them is unknown."""
_OPEN_SECONDS = 3.0
"""Longest wait for the driver to open; a slower one continues to open in the sampling thread."""
_HANG_SECONDS = 3.0
"""Time without an answer after which the driver counts as hanging."""
_CLOSE_SECONDS = 1.0
"""Longest wait for the driver at the end."""
_DESCRIBE_SECONDS = 15.0
"""Longest wait of driver_info: a driver that is not in use yet may take seconds to load."""


@dataclass(frozen=True)
class PowerSpread:
    """Mean, minimum and maximum of some power samples."""

    mean_watts: float
    min_watts: float
    max_watts: float


class Sensors:
    """Samples power at `hz` and reads the other fields once a second, in a thread.

    A reading holds the mean of the power samples since the previous reading, and all other fields as of
    `elapsed_seconds`. On most GPUs NVML's power is itself a mean over about the last second. Only `close` waits, for a
    second at most. `clock` returns the seconds since the process began.
    """

    def __init__(self, gpus: Sequence[WatchedGpu], hz: float, clock: Callable[[], float]) -> None:
        self.cpu_seconds = 0.0
        """Processor time of the sampling so far, without opening the driver."""
        self._hz = hz
        self._clock = clock
        self._absences = Absences()
        if not gpus:
            self._absences.missing("gpu", 0.0, "no GPU")
        self._gpus = GpuGroup(gpus, _GAP_PERIODS / hz)
        self._lock = threading.Lock()  # guards the next two, never held during a driver call
        self._readings: list[Sensor] = []
        self._powers_watts: list[float] = []  # since the last power_since_last
        self._opened = threading.Event()
        self._running = threading.Lock()  # released to stop; waking an Event costs more
        self._running.acquire()
        self._call_since: float | None = clock()  # None while no driver call is under way

        self._window_start = 0.0
        self._gap_seconds = 0.0  # as of the last reading, logged or not
        self._logged_gap_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)
        self._thread.start()

    def wait_opened(self, seconds: float) -> bool:
        """Wait for the driver to open or fail; return False if it takes longer than `seconds`."""
        return self._opened.wait(seconds)

    @property
    def has_gpu(self) -> bool:
        return self._gpus.found

    def reasons(self) -> dict[str, str]:
        """Return why fields are absent now: a field of the reading, energy_counter, gpu or driver."""
        self._check_hang()
        return self._gpus.reasons() | self._absences.reasons()

    def changes(self) -> list[Change]:
        """Return what became absent or available since the last call, in order."""
        self._check_hang()
        return self._gpus.changes() + self._absences.drain()

    def readings(self) -> list[Sensor]:
        """Return the readings since the last call, about one per second."""
        with self._lock:
            drained, self._readings = self._readings, []
        return drained

    def power_since_last(self) -> PowerSpread | None:
        """Return the power samples since the last call in watts; None without any."""
        with self._lock:
            powers, self._powers_watts = self._powers_watts, []
        if not powers:
            return None
        return PowerSpread(round(fmean(powers), 3), round(min(powers), 3), round(max(powers), 3))

    def close(self) -> list[Sensor]:
        """Stop, and return the last readings; the very last may span less than a second."""
        if self._running.locked():
            self._running.release()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._record_hang(self._call_since)
        return self.readings()

    def _check_hang(self) -> None:
        since = self._call_since
        if since is not None and self._clock() - since > _HANG_SECONDS:
            self._record_hang(since)

    def _record_hang(self, since: float | None) -> None:
        now = self._clock() if since is None else since
        self._absences.missing("driver", now, "the driver does not answer")

    def _run(self) -> None:
        try:
            self._open()
            if self.has_gpu:
                self._sample_until_stopped()
        except Exception as error:
            # Any error must be reported without ending the run.
            self._absences.missing("driver", self._clock(), "the sampling broke off", repr(error))
        finally:
            self._call_since = None
            self._opened.set()

    def _open(self) -> None:
        self._gpus.open(self._clock)
        now = self._window_start = self._clock()
        self._sample(now)
        self._absences.present("driver", self._clock())
        self._opened.set()

    def _sample_until_stopped(self) -> None:
        period = 1 / self._hz
        due = self._window_start
        now = self._clock()
        opening_seconds = time.thread_time()
        while True:
            due = max(due + period, now)  # missed samples are not made up for
            self._call_since = None
            stopping = self._running.acquire(timeout=due - now)
            now = self._call_since = self._clock()
            full = now - self._window_start >= 1 - period / 2
            self._sample(now)
            if full or stopping:
                self._read(now, stopping)
                self._absences.present("driver", now)
                self.cpu_seconds = time.thread_time() - opening_seconds
            if stopping:
                break
        self._gpus.close()

    def _sample(self, now: float) -> None:
        watts = self._gpus.sample(now)
        if watts is not None:
            with self._lock:
                self._powers_watts.append(watts)

    def _read(self, now: float, closing: bool) -> None:
        values = self._gpus.read(now)
        self._gap_seconds = round(self._gpus.gap_seconds(now), 6)
        measured = any(value is not None for value in values.values())
        # The last reading also records a gap that is still open.
        if measured or (closing and self._gap_seconds > self._logged_gap_seconds):
            reading = Sensor(elapsed_seconds=round(now, 6), gap_seconds=self._gap_seconds or None, **values)
            self._logged_gap_seconds = self._gap_seconds
            with self._lock:
                self._readings.append(reading)
        self._window_start = now


def open_sensors(device: str | int | Sequence[WatchedGpu] | None, hz: float, clock: Callable[[], float]) -> Sensors:
    """Start to sample GPUs; wait at most 3 s for the driver, which may also open later.

    A GPU is named as for nvml.Driver. Several are combined as in gpus.py; None or an empty list measures nothing. `hz`
    and `clock` are those of Sensors.
    """
    sensors = Sensors(_watched(device), hz, clock)
    sensors.wait_opened(_OPEN_SECONDS)
    return sensors


@dataclass(frozen=True)
class Idle:
    """GPUs without work from this program; None for what the driver does not give."""

    power_watts: float | None
    """Mean total power."""
    utilization: float | None
    """Mean share of the time in which other programs used them."""


def _watched(device: str | int | Sequence[WatchedGpu] | None) -> Sequence[WatchedGpu]:
    if isinstance(device, (str, int)):
        return [WatchedGpu(device)]
    return device or []


def measure_idle(device: str | int | Sequence[WatchedGpu], hz: float, seconds: float) -> Idle:
    """Measure power and utilization of idle GPUs for `seconds`.

    Returns at once if the GPUs cannot be read; if the driver hangs, at most one second after `seconds`. On most GPUs
    power is a mean over about a second, so the first samples include earlier work. `device` is as for open_sensors.
    """
    begin = time.monotonic()
    sensors = Sensors(_watched(device), hz, time.monotonic)
    if sensors.wait_opened(seconds) and sensors.has_gpu:
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
    readings, spread = sensors.close(), sensors.power_since_last()
    rates = [r.utilization for r in readings if r.utilization is not None]
    return Idle(
        power_watts=None if spread is None else spread.mean_watts, utilization=round(fmean(rates), 3) if rates else None
    )


@dataclass(frozen=True)
class DriverInfo:
    """Description of a GPU by its driver; None where `absent` holds the reason."""

    name: str | None = None
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    """Newest CUDA version that the driver supports."""
    total_bytes: int | None = None
    max_sm_clock_hz: float | None = None
    """Highest settable clock, above the boost clock of the datasheet."""
    power_limit_watts: float | None = None
    """Limit in force."""
    power_limit_default_watts: float | None = None
    """Limit that the board is shipped with."""
    slowdown_celsius: float | None = None
    """Temperature from which the hardware lowers its clocks."""
    used_by_others_bytes: int | None = None
    """Memory in use by other processes and the driver. It includes that of this process if the driver does not list
    processes, so call driver_info early."""
    others: dict[str, int] | None = None
    """Bytes in use by other processes, by the name of their program."""
    absent: dict[str, str] = field(default_factory=dict)


def driver_info(device: str | int) -> DriverInfo:
    """Describe a GPU, named as for open_sensors; wait at most 15 s for the driver."""
    results: list[DriverInfo] = []
    thread = threading.Thread(target=lambda: results.append(_describe(device)), daemon=True)
    thread.start()
    thread.join(_DESCRIBE_SECONDS)
    return results[0] if results else _undescribed("the driver does not answer")


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
    used_bytes = driver.read("device_used_bytes", now)
    own_bytes = driver.process_used_bytes(now) or 0
    computed = ("used_by_others_bytes", "others", "absent")
    info = DriverInfo(
        used_by_others_bytes=None if used_bytes is None else used_bytes - own_bytes,
        others=driver.others(now),
        **{name: driver.read(name, now) for name in DriverInfo.__dataclass_fields__ if name not in computed},
    )
    driver.close()
    reasons = absences.reasons()
    if used_bytes is None and "device_used_bytes" in reasons:
        reasons["used_by_others_bytes"] = reasons["device_used_bytes"]
    for name, value in vars(info).items():
        if value is None:
            info.absent[name] = reasons.get(name) or reasons.get("gpu", "the driver lost the GPU")
    return info

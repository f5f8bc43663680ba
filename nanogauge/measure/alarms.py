"""Alarms for conditions that need attention; each is raised once, with its likely cause."""

import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from nanogauge.measure.detectors import BASELINE_STEPS, LASTING_STEPS, RECENT_STEPS, LossSpikeDetector, SlowDownDetector
from nanogauge.quantities import format_seconds
from nanogauge.schema import Sensor

READINGS = 60
"""Number of newest sensor readings to keep: about one minute."""
THROTTLED_READINGS = 10
"""Kept readings that must name a throttle reason, since every GPU lowers its clock for moments."""
POWER_CAP = "power cap"
"""Throttle reason of any GPU at full load; an alarm only if the clock falls by CAPPED_CLOCK."""
CAPPED_CLOCK = 0.03
LOWER_CLOCK = 0.01
"""Smallest fall of the clock that is named as the cause of a slow-down, as a fraction."""
HOT_CELSIUS = 85.0
"""Limit for a GPU whose driver does not report its slow-down temperature."""
NEAR_CELSIUS = 5.0
FULL_MEMORY = 0.97
MAX_DATA_WAIT = 0.05
STEPS_BEFORE_PROJECTION = 30
LATE_PROJECTIONS = 10
"""Consecutive projections above the predicted interval before the alarm."""


@dataclass(frozen=True)
class Alarm:
    what: str
    """slow_down, throttling, temperature, memory, data_wait, finish_late, loss_not_finite, loss_spike, or an alarm of
    the training loop."""
    text: str
    """One sentence: the condition, its cause if known, and a remedy."""
    about: str | None = None
    """Id of the report row it concerns."""
    level: Literal["warning", "alarm"] = "alarm"
    """A warning can wait until the morning."""


@dataclass(frozen=True)
class _Conditions:
    """State of the GPU and the data loader during a few steps; None for what is not measured."""

    clock_hz: float | None
    celsius: float | None
    wait_seconds: float | None
    """Wait for data per step."""
    reasons: tuple[str, ...]
    """Throttle reasons in most readings."""


class Alarms:
    """Checks the measurements of one process; each method returns the alarms that are new.

    Each kind is raised once, throttling once for each reason. A slow-down is raised again if steps become another 10 %
    slower, or if the run has become faster for good in between; a loss spike, after the previous one has ended.

    Args:
        predicted_total_seconds: interval for the whole run; None without a prediction. device_bytes: memory of the GPU;
        None without a GPU.
        slowdown_celsius: temperature at which the GPU slows down; None if not reported.
    """

    def __init__(
        self,
        *,
        predicted_total_seconds: tuple[float, float] | None,
        device_bytes: int | None,
        slowdown_celsius: float | None,
    ) -> None:
        self._predicted = predicted_total_seconds
        self._device_bytes = device_bytes
        self._limit_celsius = slowdown_celsius
        self._raised: set[str] = set()
        self._slow_down = SlowDownDetector()
        self._loss_spike = LossSpikeDetector()
        self._steps = 0
        self._waits: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._readings: deque[Sensor] = deque(maxlen=READINGS)
        self._steady: _Conditions | None = None
        """Conditions in the steps that defined the steady step time."""
        self._late = 0

    def step(self, step: int, step_seconds: float, data_wait_seconds: float | None) -> list[Alarm]:
        """Check a steady step: one without compilation, evaluation or checkpoint."""
        self._steps += 1
        alarms = []
        if data_wait_seconds is not None:
            alarms += self._data_wait(step, step_seconds, data_wait_seconds)
        before = self._slow_down.steady_seconds
        if self._slow_down.add(step_seconds):
            alarms.append(self._slower(step))
        if self._slow_down.steady_seconds != before:
            self._steady = self._conditions()
        return alarms

    def sensor(self, reading: Sensor) -> list[Alarm]:
        """Check a sensor reading; they come about once a second."""
        self._readings.append(reading)
        alarms = []
        for reason in reading.throttle or ():
            alarms += self._throttled(reason)
        alarms += self._hot(reading)
        used, total = reading.device_used_bytes, self._device_bytes
        if used is not None and total is not None and used >= FULL_MEMORY * total:
            gpu = "the GPU" if reading.fullest_card is None else f"GPU {reading.fullest_card}"
            text = (
                f"{used / 2**30:.1f} of {gpu}'s {total / 2**30:.1f} GiB are in use: close other "
                "programs that use the GPU, or take a smaller --train.micro-batch."
            )
            alarms += self._once(Alarm("memory", text, "peak_process_bytes"))
        return alarms

    def projected(self, total_seconds: float) -> list[Alarm]:
        """Check the projected duration of the whole run after a step."""
        if self._predicted is None or self._steps < STEPS_BEFORE_PROJECTION:
            return []
        low, high = self._predicted
        self._late = self._late + 1 if total_seconds > high else 0
        if self._late < LATE_PROJECTIONS:
            return []
        text = (
            f"The run will take {format_seconds(total_seconds)}, longer than the predicted "
            f"{format_seconds(low)} to {format_seconds(high)}: check for other programs on the "
            "device; plan.py --by finds a run that ends in time."
        )
        return self._once(Alarm("finish_late", text, "total_seconds"))

    def loss(self, step: int, value: float | None) -> list[Alarm]:
        """Check the loss of a step; a non-finite one may also be None."""
        if value is None or not abs(value) < float("inf"):
            text = (
                f"The loss of step {step:,} is not finite. If more follow, take a lower learning rate "
                "or a longer warm-up."
            )
            return self._once(Alarm("loss_not_finite", text))
        if not self._loss_spike.add(step, value):
            return []
        text = (
            f"The loss rose to {value:.4g} at step {step:,}, from {self._loss_spike.baseline:.4g} "
            f"in the {BASELINE_STEPS} steps before. If it does not recover by itself, resume from "
            "an earlier checkpoint with a lower learning rate."
        )
        return [Alarm("loss_spike", text, "val_loss", "warning")]

    def _once(self, alarm: Alarm, detail: str = "") -> list[Alarm]:
        """Return the alarm, or nothing if one of its kind and detail was raised before."""
        key = alarm.what + detail
        if key in self._raised:
            return []
        self._raised.add(key)
        return [alarm]

    def _data_wait(self, step: int, step_seconds: float, waited: float) -> list[Alarm]:
        self._waits.append((step_seconds, waited))
        if len(self._waits) < RECENT_STEPS:
            return []
        all_seconds, waits = sum(seconds for seconds, _ in self._waits), [wait for _, wait in self._waits]
        # The longest wait is left out: a disk that had to spin up is no lack of data.
        if sum(waits) - max(waits) <= MAX_DATA_WAIT * all_seconds:
            return []
        text = (
            f"The device waits for its data during {100 * sum(waits) / all_seconds:.0f} % of the last "
            f"{RECENT_STEPS} steps up to step {step:,}: put the shards on a faster disk, or free "
            "the processor that reads them."
        )
        return self._once(Alarm("data_wait", text, "step_seconds"))

    def _conditions(self) -> _Conditions:
        """Return the conditions of the recent steps, back to the change of the step time."""
        seconds = (RECENT_STEPS // 2 + LASTING_STEPS) * self._slow_down.recent_seconds
        readings = list(self._readings)[-max(3, int(seconds)) :]
        clocks = [r.sm_clock_hz for r in readings if r.sm_clock_hz is not None]
        celsius = [r.temperature_celsius for r in readings if r.temperature_celsius is not None]
        waits = [wait for _, wait in list(self._waits)[-RECENT_STEPS // 2 :]]
        reasons = Counter(reason for r in readings for reason in r.throttle or ())
        return _Conditions(
            clock_hz=statistics.median(clocks) if clocks else None,
            celsius=statistics.median(celsius) if celsius else None,
            wait_seconds=statistics.fmean(waits) if waits else None,
            reasons=tuple(reason for reason, n in reasons.items() if 2 * n > len(readings)),
        )

    def _slower(self, step: int) -> Alarm:
        steady, recent = self._slow_down.steady_seconds, self._slow_down.recent_seconds
        assert steady is not None and self._steady is not None
        cause = _cause_of_slow_down(recent - steady, self._steady, self._conditions())
        text = (
            f"Steps take {format_seconds(recent)} at step {step:,}, "
            f"{100 * (recent / steady - 1):.1f} % more than the steady {format_seconds(steady)}: "
            f"{cause}."
        )
        return Alarm("slow_down", text, "step_seconds")

    def _throttled(self, reason: str) -> list[Alarm]:
        count = sum(reason in (reading.throttle or ()) for reading in self._readings)
        if count < THROTTLED_READINGS:
            return []
        clock = ""
        if POWER_CAP in reason.lower():
            fallen = self._fallen_clock()
            if fallen is None:
                return []
            clock = f", its clock is down from {_mhz(fallen[0])} to {_mhz(fallen[1])}"
        text = (
            f"The GPU is throttled ({reason}) in {count} of the last "
            f"{len(self._readings)} readings{clock}: {_remedy(reason)}."
        )
        return self._once(Alarm("throttling", text, "step_seconds"), reason)

    def _fallen_clock(self) -> tuple[float, float] | None:
        """Return (steady clock, clock under the power cap) if the latter is much lower, or None."""
        capped = [
            r.sm_clock_hz
            for r in self._readings
            if r.sm_clock_hz is not None and any(POWER_CAP in t.lower() for t in r.throttle or ())
        ]
        if self._steady is None or self._steady.clock_hz is None or not capped:
            return None
        steady, now = self._steady.clock_hz, statistics.median(capped)
        return (steady, now) if now <= (1 - CAPPED_CLOCK) * steady else None

    def _hot(self, reading: Sensor) -> list[Alarm]:
        celsius, limit = reading.temperature_celsius, self._limit_celsius
        if celsius is None or celsius < (HOT_CELSIUS if limit is None else limit - NEAR_CELSIUS):
            return []
        gpu = "The GPU" if reading.hottest_card is None else f"GPU {reading.hottest_card}"
        slows = "" if limit is None else f" and slows down at {limit:.0f} °C"
        return self._once(Alarm("temperature", f"{gpu} is at {celsius:.0f} °C{slows}: improve its cooling."))


def _cause_of_slow_down(lost_seconds: float, then: _Conditions, now: _Conditions) -> str:
    """Return the likely cause of a slow-down, and a remedy."""
    waits = then.wait_seconds, now.wait_seconds
    if waits[0] is not None and waits[1] is not None and waits[1] - waits[0] >= lost_seconds / 2:
        return (
            f"the wait for data rose from {format_seconds(waits[0])} to "
            f"{format_seconds(waits[1])} a step, put the shards on a faster disk"
        )
    if then.clock_hz is None or now.clock_hz is None:
        return "the cause is unknown, check for other programs on the device"
    if now.clock_hz > (1 - LOWER_CLOCK) * then.clock_hz:
        return f"the cause is unknown, the SM clock is still {_mhz(now.clock_hz)}; check for other programs on the GPU"
    warmer = ""
    if then.celsius is not None and now.celsius is not None and now.celsius > then.celsius:
        warmer = f"{then.celsius:.0f} to {now.celsius:.0f} °C"
    details = ", ".join(filter(None, (*now.reasons, warmer)))
    fell = f"the SM clock fell from {_mhz(then.clock_hz)} to {_mhz(now.clock_hz)}"
    return f"{fell}{f' ({details})' if details else ''}, {_remedy(*now.reasons)}"


def _remedy(*reasons: str) -> str:
    """Return the remedy for the given throttle reasons."""
    words = " ".join(reasons).lower()
    if "brake" in words:
        return "check the power supply and its cables"
    if "thermal" in words or "heat" in words or "temperature" in words:
        return "improve its cooling"
    if POWER_CAP in words:
        return "check whether its power limit was lowered (nvidia-smi -q -d POWER)"
    return "nvidia-smi -q -d PERFORMANCE shows more"


def _mhz(clock_hz: float) -> str:
    return f"{clock_hz / 1e6:,.0f} MHz"

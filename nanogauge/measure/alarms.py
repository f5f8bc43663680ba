"""Alarms: what is worth being woken for, each told once, with its cause where it is known."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from nanogauge.measure.detectors import (
    COURSE_STEPS,
    LASTING_STEPS,
    RECENT_STEPS,
    LossSpike,
    SlowDown,
)
from nanogauge.quantities import format_seconds
from nanogauge.schema import Sensor

READINGS = 60
"""readings that are looked back on: about a minute"""
THROTTLED_READINGS = 10
"""of these, that must tell a reason before it is an alarm: a clock dips for a moment on any card"""
POWER_CAP = "power cap"
"""the reason that is normal: a card at full load runs at its power limit, with a clock that is the
steady one of this run. It is an alarm only where the clock fell by CAPPED_CLOCK or more"""
CAPPED_CLOCK = 0.03
LOWER_CLOCK = 0.01
"""a clock that fell by as much is named as the cause of a slow-down"""
WARMER_CELSIUS = 5.0
HOT_CELSIUS = 85.0
"""for a card whose driver does not tell the temperature at which it slows down"""
NEAR_CELSIUS = 5.0
FULL_MEMORY = 0.97
MOST_WAIT = 0.05
STEPS_BEFORE_PROJECTION = 30
OUTSIDE_PROJECTIONS = 10
"""in a row, before a finish outside of what was predicted is told"""


@dataclass(frozen=True)
class Alarm:
    what: str
    """slow_down, throttling, temperature, memory, data_wait, finish_late, finish_early,
    loss_not_finite or loss_spike, or what the loop itself has to tell"""
    text: str
    """one sentence: what is the matter, why where that is known, and what to do"""
    about: str | None = None
    """the row id it bears on"""
    level: Literal["warning", "alarm"] = "alarm"
    """a warning may wait until the morning"""


@dataclass(frozen=True)
class _Conditions:
    """Under which steps are made; None where it is not measured."""

    clock_hz: float | None
    celsius: float | None
    wait_seconds: float | None
    """for data, per step"""
    reasons: tuple[str, ...]
    """why the clock is lower than it could be"""


class Alarms:
    """Watches the numbers of one process of a run; each method returns what is to be told now.

    Each kind is told once, throttling once for each reason. A slow-down is told again where steps
    take another 10 % longer than was told, or where the run had become faster for good meanwhile; a
    spike of the loss where the one before is over.

    Args:
        predicted_total_seconds: the interval for the whole run, where there is one.
        device_bytes: memory of the card; None where there is no card.
        slowdown_celsius: the temperature at which the card slows down, where the driver tells.
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
        self._told: set[str] = set()
        self._slow_down = SlowDown()
        self._loss_spike = LossSpike()
        self._steps = 0
        self._waits: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._wait_seconds = self._waited_steps_seconds = 0.0
        self._readings: deque[Sensor] = deque(maxlen=READINGS)
        self._reasons: Counter[str] = Counter()
        self._steady: _Conditions | None = None
        """of the steps that the steady median is of"""
        self._late = self._early = 0

    def step(self, step: int, step_seconds: float, data_wait_seconds: float | None) -> list[Alarm]:
        """A steady step was made: no compilation, evaluation or checkpoint lies in it.

        Args:
            step: its number, as in the log.
            step_seconds: how long it took.
            data_wait_seconds: how much of that it waited for its batches; None if not measured.
        """
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
        """The sensors were read, about a second after the reading before."""
        if len(self._readings) == READINGS:
            self._reasons.subtract(self._readings[0].throttle or ())
        self._readings.append(reading)
        self._reasons.update(reading.throttle or ())
        alarms = []
        for reason in reading.throttle or ():
            alarms += self._throttled(reason)
        celsius = reading.temperature_celsius
        if celsius is not None and (text := _hot(celsius, self._limit_celsius)) is not None:
            which = "" if reading.hottest_card is None else f" It is card {reading.hottest_card}."
            alarms += self._once(Alarm("temperature", text + which))
        used, card = reading.device_used_bytes, self._device_bytes
        if used is not None and card is not None and used >= FULL_MEMORY * card:
            text = _full(used, card, reading.process_used_bytes, reading.fullest_card)
            alarms += self._once(Alarm("memory", text, "peak_process_bytes"))
        return alarms

    def projected(self, total_seconds: float) -> list[Alarm]:
        """A whole run of so many seconds is expected now, as after every step."""
        if self._predicted is None or self._steps < STEPS_BEFORE_PROJECTION:
            return []
        low, high = self._predicted
        self._late = self._late + 1 if total_seconds > high else 0
        self._early = self._early + 1 if total_seconds < low else 0
        interval = f"the predicted {format_seconds(low)} to {format_seconds(high)}"
        takes = f"The run will take {format_seconds(total_seconds)}"
        if self._late >= OUTSIDE_PROJECTIONS:
            text = (
                f"{takes}, longer than {interval}: see whether another program uses the device; "
                "plan.py --by tells what would end in time."
            )
            return self._once(Alarm("finish_late", text, "total_seconds"))
        if self._early >= OUTSIDE_PROJECTIONS:
            text = f"{takes}, less than {interval}: nothing needs to be done."
            return self._once(Alarm("finish_early", text, "total_seconds", "warning"))
        return []

    def loss(self, step: int, value: float | None) -> list[Alarm]:
        """The loss of a step; None, infinite or no number where it is not finite."""
        if value is None or not abs(value) < float("inf"):
            text = (
                f"The loss of step {step:,} is not finite: such an update is skipped. If more "
                "follow, take a lower --optimizer.learning-rate or a longer "
                "--optimizer.warmup-steps."
            )
            return self._once(Alarm("loss_not_finite", text))
        if not self._loss_spike.add(step, value):
            return []
        text = (
            f"The loss rose to {value:.4g} at step {step:,}, from {self._loss_spike.course:.4g} "
            f"in the {COURSE_STEPS} steps before: it may come back by itself. If it does not, go "
            "on from a checkpoint before it with a lower --optimizer.learning-rate."
        )
        return [Alarm("loss_spike", text, "val_loss", "warning")]

    def _once(self, alarm: Alarm, detail: str = "") -> list[Alarm]:
        """The alarm, where none of its kind and detail was told yet."""
        key = alarm.what + detail
        if key in self._told:
            return []
        self._told.add(key)
        return [alarm]

    def _data_wait(self, step: int, step_seconds: float, waited: float) -> list[Alarm]:
        if len(self._waits) == RECENT_STEPS:
            old_seconds, old_wait = self._waits[0]
            self._waited_steps_seconds -= old_seconds
            self._wait_seconds -= old_wait
        self._waits.append((step_seconds, waited))
        self._waited_steps_seconds += step_seconds
        self._wait_seconds += waited
        most = MOST_WAIT * self._waited_steps_seconds
        if len(self._waits) < RECENT_STEPS or self._wait_seconds <= most:
            return []
        # One long wait, for a disk that had gone to sleep, is no lack of data.
        if self._wait_seconds - max(wait for _, wait in self._waits) <= most:
            return []
        share = self._wait_seconds / self._waited_steps_seconds
        text = (
            f"The device waits for its data during {100 * share:.0f} % of the last "
            f"{RECENT_STEPS} steps up to step {step:,}: put the shards on a faster disk, or free "
            "the processor that reads them."
        )
        return self._once(Alarm("data_wait", text, "step_seconds"))

    def _conditions(self) -> _Conditions:
        """Of the recent steps that are certain to be alike."""
        alike = (RECENT_STEPS // 2 + LASTING_STEPS) * self._slow_down.recent_seconds
        readings = list(self._readings)[-max(3, int(alike)) :]
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
        why = _why_slower(recent - steady, self._steady, self._conditions())
        text = (
            f"Steps take {format_seconds(recent)} at step {step:,}, "
            f"{100 * (recent / steady - 1):.1f} % more than the steady {format_seconds(steady)}: "
            f"{why}."
        )
        return Alarm("slow_down", text, "step_seconds")

    def _throttled(self, reason: str) -> list[Alarm]:
        if self._reasons[reason] < THROTTLED_READINGS:
            return []
        clock = ""
        if POWER_CAP in reason.lower():
            fallen = self._fallen_clock()
            if fallen is None:
                return []
            clock = f", its clock is down from {_mhz(fallen[0])} to {_mhz(fallen[1])}"
        text = (
            f"The card is throttled ({reason}) in {self._reasons[reason]} of the last "
            f"{len(self._readings)} readings{clock}: {_remedy(reason)}."
        )
        return self._once(Alarm("throttling", text, "step_seconds"), reason)

    def _fallen_clock(self) -> tuple[float, float] | None:
        """The steady clock, and the one under the power cap where it is much lower."""
        capped = [
            r.sm_clock_hz
            for r in self._readings
            if r.sm_clock_hz is not None and any(POWER_CAP in t.lower() for t in r.throttle or ())
        ]
        if self._steady is None or self._steady.clock_hz is None or not capped:
            return None
        steady, now = self._steady.clock_hz, statistics.median(capped)
        return (steady, now) if now <= (1 - CAPPED_CLOCK) * steady else None


def _hot(celsius: float, limit_celsius: float | None) -> str | None:
    """What to say of a temperature that is too near to the one at which the card slows down."""
    if limit_celsius is None and celsius >= HOT_CELSIUS:
        return f"The card has {celsius:.0f} °C: give it more air."
    if limit_celsius is not None and celsius >= limit_celsius - NEAR_CELSIUS:
        slows = f"it slows down at {limit_celsius:.0f} °C"
        return f"The card has {celsius:.0f} °C, and {slows}: give it more air."
    return None


def _why_slower(lost_seconds: float, then: _Conditions, now: _Conditions) -> str:
    """The cause of a slow-down, and what to do."""
    waits = then.wait_seconds, now.wait_seconds
    if waits[0] is not None and waits[1] is not None and waits[1] - waits[0] >= lost_seconds / 2:
        return (
            f"the wait for data rose from {format_seconds(waits[0])} to "
            f"{format_seconds(waits[1])} a step, put the shards on a faster disk"
        )
    rise = None
    if then.celsius is not None and now.celsius is not None:
        rise = now.celsius - then.celsius
    warmer = f"{then.celsius:.0f} to {now.celsius:.0f} °C" if rise is not None and rise > 0 else ""
    if then.clock_hz is None or now.clock_hz is None:
        if rise is not None and rise >= WARMER_CELSIUS:
            return f"the card went from {warmer}, give it more air"
        return "the cause is not known, see whether another program uses the device"
    if now.clock_hz > (1 - LOWER_CLOCK) * then.clock_hz:
        return (
            f"the cause is not known, the SM clock is still {_mhz(now.clock_hz)}; "
            "see whether another program uses the card"
        )
    beside = ", ".join(filter(None, (*now.reasons, warmer)))
    fell = f"the SM clock fell from {_mhz(then.clock_hz)} to {_mhz(now.clock_hz)}"
    return f"{fell}{f' ({beside})' if beside else ''}, {_remedy(*now.reasons)}"


def _remedy(*reasons: str) -> str:
    """What to do about a clock that is lower than it could be."""
    words = " ".join(reasons).lower()
    if "brake" in words:
        return "check the power supply and its cables"
    if "thermal" in words or "heat" in words or "temperature" in words:
        return "give it more air"
    if POWER_CAP in words:
        return "see whether its power limit was set lower (nvidia-smi -q -d POWER)"
    return "nvidia-smi -q -d PERFORMANCE tells more"


def _full(used: int, card: int, process: int | None, number: int | None) -> str:
    """Of several cards `process` may be about another one than the fullest, and is left out."""
    own = (
        f", {process / 2**30:.1f} GiB of them by this process"
        if process is not None
        else ", the driver does not tell by whom"
    )
    of, own = ("the card", own) if number is None else (f"card {number}", "")
    return (
        f"{used / 2**30:.1f} of {of}'s {card / 2**30:.1f} GiB are in use{own}: close other "
        "programs that use the card, or take a smaller --train.micro-batch."
    )


def _mhz(clock_hz: float) -> str:
    return f"{clock_hz / 1e6:,.0f} MHz"

"""Alarms: a real slow-down is told once and soon, and no noise is told at all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.measure.alarms import Alarm, Alarms
from nanogauge.measure.detectors import SlidingMedian, SlowDown
from nanogauge.schema import Sensor

GIB = 2**30


def alarms(
    predicted: tuple[float, float] | None = None,
    device_bytes: int | None = 12 * GIB,
    slowdown_celsius: float | None = 90.0,
) -> Alarms:
    return Alarms(
        predicted_total_seconds=predicted,
        device_bytes=device_bytes,
        slowdown_celsius=slowdown_celsius,
    )


def told(watch: Alarms, times: Iterable[float]) -> list[tuple[int, Alarm]]:
    """What is told of steps that take so long, each with the step at which it is."""
    return [(i, alarm) for i, t in enumerate(times) for alarm in watch.step(i, t, None)]


def times(
    seed: int,
    steps: int,
    level: Callable[[int], float],
    jitter: float,
    spike_share: float = 0.0,
    spike: float = 0.0,
) -> Iterable[float]:
    """Step times: a level, noise around it, and single steps that take longer by a share."""
    draw = random.Random(seed)
    for i in range(steps):
        noisy = level(i) * max(0.05, draw.gauss(1, jitter))
        yield noisy * (1 + spike) if draw.random() < spike_share else noisy


def test_a_sliding_median_is_the_median_of_the_last_values() -> None:
    """Repeated values too: exactly one of them goes when its time is over."""
    window, seen = SlidingMedian(5), []
    for value in [3.0, 1.0, 3.0, 3.0, 2.0, 9.0, 3.0, 1.0, 1.0]:
        window.add(value)
        seen.append(value)
        last = sorted(seen[-5:])
        assert window.values() == last
        middle = len(last) // 2
        expected = last[middle] if len(last) % 2 else (last[middle - 1] + last[middle]) / 2
        assert window.median == expected


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    base=st.floats(1e-3, 1e3),
    drift=st.floats(0.03, 3),
    start=st.integers(300, 1000),
    jitter=st.floats(0, 0.004),
    spike_share=st.floats(0, 0.1),
)
def test_a_slow_down_is_told_exactly_once_within_50_steps(
    seed: int, base: float, drift: float, start: int, jitter: float, spike_share: float
) -> None:
    """Of 3 % or more, whatever a step takes, with up to one step in ten being a spike."""
    level = lambda i: base * (1 + drift * (i >= start))  # noqa: E731
    found = told(alarms(), times(seed, start + 2000, level, jitter, spike_share, 0.5))
    assert [(alarm.what, alarm.about) for _, alarm in found] == [("slow_down", "step_seconds")]
    assert start <= found[0][0] < start + 50


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    jitter=st.sampled_from([0.002, 0.01, 0.05, 0.2]),
    spikes=st.sampled_from([(0.01, 0.01), (0.01, 0.3), (0.1, 0.5), (0.5, 0.01)]),
)
def test_jitter_and_spikes_over_20000_steps_raise_nothing(
    seed: int, jitter: float, spikes: tuple[float, float]
) -> None:
    """Neither 1 % of steps as spikes nor spikes of 1 %, nor a CPU whose steps vary by a fifth."""
    assert told(alarms(), times(seed, 20_000, lambda i: 1.0, jitter, *spikes)) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_that_lasts_for_many_steps_is_no_slow_down(seed: int) -> None:
    """The spread of single steps says that medians of 50 are exact to 0.2 %; they wander by 0.7 %
    where ten steps in a row share their noise.
    """
    draw, wander, steps = random.Random(seed), 0.0, []
    for _ in range(20_000):
        wander = 0.9 * wander + draw.gauss(0, 0.01 * math.sqrt(1 - 0.9**2))
        steps.append(1 + wander)
    assert told(alarms(), steps) == []


def test_a_slow_drift_is_told_once_it_is_beyond_two_percent() -> None:
    """0.01 % a step: no step is noticeably slower than the one before."""
    level = lambda i: 1 + 1e-4 * max(0, i - 500)  # noqa: E731
    found = told(alarms(), times(0, 1500, level, 0.002))
    assert len(found) == 1
    step, alarm = found[0]
    assert 700 <= step < 760
    assert "2.1 % more than the steady 1 s" in alarm.text


def test_a_slow_down_that_grows_by_a_tenth_is_told_again() -> None:
    """Once more where it became another matter, and not when it comes back as it was."""

    def level(i: int) -> float:
        return {0: 1.0, 1: 1.05, 2: 1.0, 3: 1.06, 4: 1.3}.get(i // 1000, 1.3)

    found = [step for step, _ in told(alarms(), times(0, 6000, level, 0.002))]
    assert len(found) == 2
    assert 1000 <= found[0] < 1050
    assert 4000 <= found[1] < 4050


@pytest.mark.parametrize(("first", "steps"), [(0.9, 60), (0.97, 150), (1.3, 60), (1.3, 200)])
def test_the_warm_up_hides_no_slow_down_and_is_none(first: float, steps: int) -> None:
    """Slower or faster at first: the steady median is of what comes after."""
    level = lambda i: first if i < steps else (1.05 if i >= 3000 else 1.0)  # noqa: E731
    found = told(alarms(), times(0, 4000, level, 0.002))
    assert [3000 <= step < 3050 for step, _ in found] == [True]


def test_a_slow_down_while_the_steady_median_is_gathered_is_told() -> None:
    """It begins 50 steps into the 100 that the steady median is made of."""
    found = told(alarms(), times(0, 1000, lambda i: 1.0 if i < 200 else 1.1, 0.002))
    assert [step < 270 for step, _ in found] == [True]


def test_a_run_that_becomes_faster_has_a_new_steady_median() -> None:
    """Another program ran beside the first 2,000 steps: what is lost later counts from without."""
    level = lambda i: 1.5 if i < 2000 else (1.0 if i < 4000 else 1.05)  # noqa: E731
    found = told(alarms(), times(0, 6000, level, 0.002))
    assert [4000 <= step < 4050 for step, _ in found] == [True]
    assert "5" in found[0][1].text and "the steady 1 s" in found[0][1].text


def test_watching_a_step_costs_less_than_20_microseconds() -> None:
    """It stands in the training loop: a sort of all that was would be felt."""
    noisy = list(times(0, 20_000, lambda i: 1.0 + 0.05 * (i > 500), 0.05, 0.1, 0.5))
    watch = alarms()
    began = time.process_time()
    for i, t in enumerate(noisy):
        watch.step(i, t, 0.01)
        watch.projected(1e5)
        watch.loss(i, 3.5)
    assert time.process_time() - began < 20_000 * 20e-6


def reading(**fields: object) -> Sensor:
    return Sensor.model_validate({"throttle": [], "sm_clock_hz": 2.7e9, **fields})


def slowed(before: Sensor, after: Sensor, waits: tuple[float | None, float | None]) -> str:
    """The sentence about steps that go from 4 s to 4.4 s while the sensors and waits change."""
    watch, found = alarms(), []
    for i in range(600):
        late = i >= 500
        for _ in range(4):
            found += watch.sensor(after if late else before)
        found += watch.step(i, 4.4 if late else 4.0, waits[late])
    (alarm,) = [alarm for alarm in found if alarm.what == "slow_down"]
    return alarm.text


def test_a_slow_down_tells_its_cause() -> None:
    """The clock, with the reason the card gives; the data; or that nothing else has changed."""
    cool = reading(temperature_celsius=70.0)
    hot = reading(
        temperature_celsius=84.0, sm_clock_hz=2.4e9, throttle=["hardware thermal slow-down"]
    )
    assert slowed(cool, hot, (0.0, 0.0)) == (
        "Steps take 4.4 s at step 533, 10.0 % more than the steady 4 s: the SM clock fell from "
        "2,700 MHz to 2,400 MHz (hardware thermal slow-down, 70 to 84 °C), give it more air."
    )
    assert "the wait for data rose from 10 ms to 0.41 s a step" in slowed(cool, cool, (0.01, 0.41))
    assert "not known, the SM clock is still 2,700 MHz" in slowed(cool, cool, (0.01, 0.01))
    silent = Sensor()
    assert "the cause is not known" in slowed(silent, silent, (None, None))
    warm, warmer = Sensor(temperature_celsius=60.0), Sensor(temperature_celsius=80.0)
    assert "the card went from 60 to 80 °C" in slowed(warm, warmer, (None, None))


def whats(found: Iterable[list[Alarm]]) -> list[str]:
    return [alarm.what for some in found for alarm in some]


def test_throttling_is_told_once_for_each_reason_that_lasts() -> None:
    """Ten readings of a minute: any card's clock dips for a moment now and then."""
    watch = alarms()
    brake, heat = (reading(throttle=[why]) for why in ("power brake", "thermal slow-down"))
    assert whats(watch.sensor(brake) for _ in range(9)) == []
    assert whats(watch.sensor(reading()) for _ in range(60)) == []
    assert whats(watch.sensor(brake) for _ in range(9)) == []
    (alarm,) = watch.sensor(brake)
    assert "(power brake) in 10 of the last 60 readings: check the power supply" in alarm.text
    assert whats(watch.sensor(brake) for _ in range(100)) == []
    assert whats(watch.sensor(heat) for _ in range(100)) == ["throttling"]


@pytest.mark.parametrize(("clock_hz", "expected"), [(2.65e9, []), (2.6e9, ["throttling"])])
def test_a_power_cap_is_an_alarm_only_where_the_clock_fell(
    clock_hz: float, expected: list[str]
) -> None:
    """A GeForce at full load runs at its power limit: that alone is as it should be."""
    watch = alarms()
    capped = reading(throttle=["power cap"])
    for i in range(300):
        assert watch.sensor(capped) == []
        assert watch.step(i, 1.0, None) == []
    lower = reading(throttle=["power cap"], sm_clock_hz=clock_hz)
    assert whats(watch.sensor(lower) for _ in range(100)) == expected


@pytest.mark.parametrize(("limit", "cool", "hot"), [(90.0, 84.0, 85.0), (None, 84.0, 85.0)])
def test_a_hot_card_is_told_once(limit: float | None, cool: float, hot: float) -> None:
    """Within 5 °C of where it slows down; at 85 °C where the driver does not tell."""
    watch = alarms(slowdown_celsius=limit)
    assert watch.sensor(reading(temperature_celsius=cool)) == []
    found = whats(watch.sensor(reading(temperature_celsius=hot)) for _ in range(9))
    assert found == ["temperature"]


def test_a_full_card_is_told_with_the_share_of_this_process() -> None:
    """Within 3 % of the card the next allocation may fail; the cause may be another program."""
    watch = alarms()
    assert watch.sensor(reading(device_used_bytes=int(0.969 * 12 * GIB))) == []
    full = reading(device_used_bytes=int(0.98 * 12 * GIB), process_used_bytes=9 * GIB)
    (alarm,) = watch.sensor(full)
    assert "11.8 of the card's 12.0 GiB are in use, 9.0 GiB of them by this process" in alarm.text
    assert alarm.about == "peak_process_bytes"
    assert watch.sensor(full) == []
    assert alarms(device_bytes=None).sensor(full) == []


def test_waiting_for_data_is_told_where_it_lasts() -> None:
    """Above 5 % of 50 steps; a disk that had to wake up once is no lack of data."""
    watch = alarms()
    assert whats(watch.step(i, 1.0, 0.049) for i in range(200)) == []
    assert whats([watch.step(200, 11.0, 10.0)]) == []
    assert whats(watch.step(i, 1.0, 0.049) for i in range(201, 260)) == []
    found = [alarm for i in range(100) for alarm in watch.step(i, 1.0, 0.06)]
    assert [alarm.what for alarm in found] == ["data_wait"]
    assert whats(alarms().step(i, 1.0, None) for i in range(100)) == []


def test_a_finish_outside_of_the_prediction_is_told_once_for_each_side() -> None:
    """After 30 steady steps; a projection that swings over the edge for a moment is none."""
    watch = alarms(predicted=(3600.0, 7200.0))
    assert watch.projected(1e9) == []
    for i in range(30):
        watch.step(i, 1.0, None)
    swinging = [7300.0, 7100.0] * 50
    assert whats(watch.projected(total) for total in swinging) == []
    late = [alarm for _ in range(100) for alarm in watch.projected(7300.0)]
    assert [(alarm.what, alarm.level) for alarm in late] == [("finish_late", "alarm")]
    assert "will take 2.03 h, longer than the predicted 60 min to 2 h" in late[0].text
    early = [alarm for _ in range(100) for alarm in watch.projected(3000.0)]
    assert [(alarm.what, alarm.level) for alarm in early] == [("finish_early", "warning")]
    assert alarms(predicted=None).projected(1e9) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_once(value: float | None) -> None:
    watch = alarms()
    assert watch.loss(6, 3.5) == []
    assert [alarm.what for alarm in watch.loss(7, value)] == ["loss_not_finite"]
    assert watch.loss(8, value) == []


@given(
    st.lists(
        st.tuples(
            st.floats(1e-6, 1e6), st.none() | st.floats(0, 1e6), st.none() | st.floats(20, 120)
        ),
        max_size=300,
    )
)
@settings(max_examples=30, deadline=None)
def test_each_kind_is_told_once_whatever_happens(
    steps: list[tuple[float, float | None, float | None]],
) -> None:
    """Up to a run that became faster, the kinds that are told differ."""
    watch, found = alarms(predicted=(1.0, 2.0)), []
    for i, (seconds, waited, celsius) in enumerate(steps):
        found += watch.sensor(reading(temperature_celsius=celsius))
        found += watch.step(i, seconds, waited)
        found += watch.projected(seconds)
    kinds = [alarm.what for alarm in found if alarm.what != "slow_down"]
    assert len(kinds) == len(set(kinds))
    assert all(alarm.text.endswith(".") for alarm in found)


def test_a_slow_down_is_not_told_again_because_a_faster_level_was_confirmed_in_it() -> None:
    """A demo was slowed down just as its faster pace became the steady one, and said so twice."""
    told: list[int] = []
    for faster in range(40, 101, 5):
        detector = SlowDown()
        times = [0.040] * 400 + [0.036] * faster + [0.1] * 200
        told.append(sum(detector.add(seconds) for seconds in times))
    assert set(told) == {1}

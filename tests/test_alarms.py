"""Alarms: each condition is raised once, and noise raises none."""

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from examples import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.measure.alarms import Alarm, Alarms
from nanogauge.measure.detectors import BASELINE_STEPS, LossSpikeDetector
from nanogauge.schema import Sensor

GIB = 2**30


def alarms(
    predicted: tuple[float, float] | None = None,
    device_bytes: int | None = 12 * GIB,
    slowdown_celsius: float | None = 90.0,
) -> Alarms:
    return Alarms(predicted_total_seconds=predicted, device_bytes=device_bytes, slowdown_celsius=slowdown_celsius)


def raised(watch: Alarms, times: Iterable[float]) -> list[tuple[int, Alarm]]:
    """Return the alarms of steps with these times, each with its step."""
    return [(i, alarm) for i, t in enumerate(times) for alarm in watch.step(i, t, None)]


def times(
    seed: int, steps: int, level: Callable[[int], float], jitter: float, spike_share: float = 0.0, spike: float = 0.0
) -> Iterable[float]:
    """Yield step times: a level, noise around it, and single steps that are slower by a share."""
    draw = random.Random(seed)
    for i in range(steps):
        noisy = level(i) * max(0.05, draw.gauss(1, jitter))
        yield noisy * (1 + spike) if draw.random() < spike_share else noisy


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    base=st.floats(1e-3, 1e3),
    drift=st.floats(0.03, 3),
    start=st.integers(300, 1000),
    jitter=st.floats(0, 0.004),
    spike_share=st.floats(0, 0.1),
)
def test_a_slow_down_of_3_percent_is_raised_once_within_50_steps(
    seed: int, base: float, drift: float, start: int, jitter: float, spike_share: float
) -> None:
    level = lambda i: base * (1 + drift * (i >= start))  # noqa: E731
    found = raised(alarms(), times(seed, start + 2000, level, jitter, spike_share, 0.5))
    assert [(alarm.what, alarm.about) for _, alarm in found] == [("slow_down", "step_seconds")]
    assert start <= found[0][0] < start + 50


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    jitter=st.sampled_from([0.002, 0.01, 0.05, 0.2]),
    spikes=st.sampled_from([(0.01, 0.01), (0.01, 0.3), (0.1, 0.5), (0.5, 0.01)]),
)
def test_jitter_and_spikes_over_20000_steps_raise_nothing(
    seed: int, jitter: float, spikes: tuple[float, float]
) -> None:
    assert raised(alarms(), times(seed, 20_000, lambda i: 1.0, jitter, *spikes)) == []


@pytest.mark.parametrize("seed", range(2))
def test_correlated_noise_is_no_slow_down(seed: int) -> None:
    """With noise correlated over ten steps medians of 50 vary by 0.7 %; the spread of single steps predicts 0.2 %."""
    draw, wander, steps = random.Random(seed), 0.0, []
    for _ in range(20_000):
        wander = 0.9 * wander + draw.gauss(0, 0.01 * math.sqrt(1 - 0.9**2))
        steps.append(1 + wander)
    assert raised(alarms(), steps) == []


def test_a_slow_drift_is_raised_once_beyond_two_and_a_half_percent() -> None:
    level = lambda i: 1 + 1e-4 * max(0, i - 500)  # noqa: E731
    ((step, alarm),) = raised(alarms(), times(0, 1500, level, 0.002))
    assert 750 <= step < 810
    assert "2.6 % more than the steady 1 s" in alarm.text


def test_a_slow_down_that_grows_by_a_tenth_is_raised_again() -> None:
    """A slow-down that returns unchanged is not reported again."""

    def level(i: int) -> float:
        return {0: 1.0, 1: 1.05, 2: 1.0, 3: 1.06, 4: 1.3}.get(i // 1000, 1.3)

    found = [step for step, _ in raised(alarms(), times(0, 6000, level, 0.002))]
    assert len(found) == 2
    assert 1000 <= found[0] < 1050
    assert 4000 <= found[1] < 4050


@pytest.mark.parametrize(("first", "steps"), [(0.9, 60), (0.98, 1000), (1.3, 60), (1.3, 200)])
def test_the_warm_up_is_no_slow_down_and_hides_none(first: float, steps: int) -> None:
    level = lambda i: first if i < steps else (1.05 if i >= 3000 else 1.0)  # noqa: E731
    found = raised(alarms(), times(0, 4000, level, 0.002))
    assert [3000 <= step < 3050 for step, _ in found] == [True]


def test_a_slow_down_while_the_steady_median_is_collected_is_raised() -> None:
    found = raised(alarms(), times(0, 1000, lambda i: 1.0 if i < 200 else 1.1, 0.002))
    assert [step < 270 for step, _ in found] == [True]


def test_a_run_that_becomes_faster_has_a_new_steady_median() -> None:
    level = lambda i: 1.5 if i < 2000 else (1.0 if i < 4000 else 1.05)  # noqa: E731
    found = raised(alarms(), times(0, 6000, level, 0.002))
    assert [4000 <= step < 4050 for step, _ in found] == [True]
    assert "5" in found[0][1].text and "the steady 1 s" in found[0][1].text


def reading(**fields: object) -> Sensor:
    return Sensor.model_validate({"throttle": [], "sm_clock_hz": 2.7e9, **fields})


def slowed(before: Sensor, after: Sensor, waits: tuple[float | None, float | None]) -> str:
    """Return the alarm text for steps that go from 4 s to 4.4 s as sensors and waits change."""
    watch, found = alarms(), []
    for i in range(600):
        late = i >= 500
        for _ in range(4):
            found += watch.sensor(after if late else before)
        found += watch.step(i, 4.4 if late else 4.0, waits[late])
    (alarm,) = [alarm for alarm in found if alarm.what == "slow_down"]
    return alarm.text


def test_a_slow_down_names_its_cause() -> None:
    cool = reading(temperature_celsius=70.0)
    hot = reading(temperature_celsius=84.0, sm_clock_hz=2.4e9, throttle=["hardware thermal slow-down"])
    assert slowed(cool, hot, (0.0, 0.0)) == (
        "Steps take 4.4 s at step 533, 10.0 % more than the steady 4 s: the SM clock fell from "
        "2,700 MHz to 2,400 MHz (hardware thermal slow-down, 70 to 84 °C), improve its cooling."
    )
    assert "the wait for data rose from 10 ms to 0.41 s a step" in slowed(cool, cool, (0.01, 0.41))
    assert "unknown, the SM clock is still 2,700 MHz" in slowed(cool, cool, (0.01, 0.01))
    silent = Sensor()
    assert "the cause is unknown" in slowed(silent, silent, (None, None))


def whats(found: Iterable[list[Alarm]]) -> list[str]:
    return [alarm.what for some in found for alarm in some]


def test_throttling_is_raised_once_for_each_lasting_reason() -> None:
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
def test_a_power_cap_is_an_alarm_only_if_the_clock_falls(clock_hz: float, expected: list[str]) -> None:
    """A GeForce at full load always runs at its power limit."""
    watch = alarms()
    capped = reading(throttle=["power cap"])
    for i in range(300):
        assert watch.sensor(capped) == []
        assert watch.step(i, 1.0, None) == []
    lower = reading(throttle=["power cap"], sm_clock_hz=clock_hz)
    assert whats(watch.sensor(lower) for _ in range(100)) == expected


@pytest.mark.parametrize(("limit", "cool", "hot"), [(90.0, 84.0, 85.0), (None, 84.0, 85.0)])
def test_a_hot_gpu_is_raised_once(limit: float | None, cool: float, hot: float) -> None:
    watch = alarms(slowdown_celsius=limit)
    assert watch.sensor(reading(temperature_celsius=cool)) == []
    found = whats(watch.sensor(reading(temperature_celsius=hot)) for _ in range(9))
    assert found == ["temperature"]


def test_a_full_gpu_is_raised_once() -> None:
    watch = alarms()
    assert watch.sensor(reading(device_used_bytes=int(0.969 * 12 * GIB))) == []
    full = reading(device_used_bytes=int(0.98 * 12 * GIB))
    (alarm,) = watch.sensor(full)
    assert "11.8 of the GPU's 12.0 GiB are in use" in alarm.text
    assert alarm.about == "peak_process_bytes"
    assert watch.sensor(full) == []
    assert alarms(device_bytes=None).sensor(full) == []


def test_a_lasting_wait_for_data_is_raised() -> None:
    """One long wait, for a disk that spins up, is no lack of data."""
    watch = alarms()
    assert whats(watch.step(i, 1.0, 0.049) for i in range(200)) == []
    assert whats([watch.step(200, 11.0, 10.0)]) == []
    assert whats(watch.step(i, 1.0, 0.049) for i in range(201, 260)) == []
    found = [alarm for i in range(100) for alarm in watch.step(i, 1.0, 0.06)]
    assert [alarm.what for alarm in found] == ["data_wait"]
    assert whats(alarms().step(i, 1.0, None) for i in range(100)) == []


def test_a_projection_above_the_prediction_is_raised_once() -> None:
    watch = alarms(predicted=(3600.0, 7200.0))
    assert watch.projected(1e9) == []
    for i in range(30):
        watch.step(i, 1.0, None)
    swinging = [7300.0, 7100.0] * 50
    assert whats(watch.projected(total) for total in swinging) == []
    late = [alarm for _ in range(100) for alarm in watch.projected(7300.0)]
    assert [(alarm.what, alarm.level) for alarm in late] == [("finish_late", "alarm")]
    assert "will take 2.03 h, longer than the predicted 60 min to 2 h" in late[0].text
    assert alarms(predicted=None).projected(1e9) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_raised_once(value: float | None) -> None:
    watch = alarms()
    assert watch.loss(6, 3.5) == []
    assert [alarm.what for alarm in watch.loss(7, value)] == ["loss_not_finite"]
    assert watch.loss(8, value) == []


def test_an_alarm_names_its_gpu() -> None:
    watch = alarms(device_bytes=10 * GIB)
    several = Sensor(temperature_celsius=88, hottest_card=1, device_used_bytes=10 * GIB, fullest_card=2)
    hot, full = watch.sensor(several)
    assert hot.text.startswith("GPU 1 is at 88 °C and slows down at 90 °C")
    assert full.text.startswith("10.0 of GPU 2's 10.0 GiB are in use: close other")


LOGS = {"rtx4070_fineweb_train_log.txt": 101, "rtx4070_nanochat_d12_train_log.txt": 200}
"""Logs of undisturbed runs, and their minimum number of losses."""


def spikes(losses: Iterable[float]) -> list[int]:
    """Return the steps at which a spike is reported."""
    watch = LossSpikeDetector()
    return [step for step, loss in enumerate(losses) if watch.add(step, loss)]


def curve(seed: int, steps: int, noise: float, extra: Callable[[int], float] = lambda _: 0.0) -> Iterable[float]:
    """Yield losses that fall from 10.8 towards 3.2 nats, with noise and an extra term."""
    draw = random.Random(seed)
    for step in range(steps):
        yield 3.2 + 7.6 / (1 + step / 40) ** 0.8 + draw.gauss(0, noise) + extra(step)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shared(f"data/{name}")) for name in LOGS])
def test_no_recorded_run_has_a_spike(name: str) -> None:
    text = (SHARED / "data" / name).read_text()
    words = [line.replace("|", " ").split() for line in text.splitlines()]
    losses = [
        float(word.rstrip(","))
        for line in words
        for before, word in itertools.pairwise(line)
        if before.rstrip(":") == "loss" and line[0] in ("iter", "step")
    ]
    assert len(losses) >= LOGS[name]
    assert spikes(losses) == []


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 0.003, 0.03, 0.3]), odd=st.floats(0, 0.03))
def test_a_smooth_curve_with_noise_and_odd_batches_has_no_spike(seed: int, noise: float, odd: float) -> None:
    """Up to 3 % of batches have a loss that is 2 nats higher."""
    draw = random.Random(seed)
    rise = [2.0 if draw.random() < odd and step % 2 else 0.0 for step in range(10_000)]
    assert spikes(curve(seed, 10_000, noise, lambda step: rise[step])) == []


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    noise=st.floats(0, 0.03),
    begin=st.integers(400, 1500),
    lasts=st.integers(3, 400),
    rise=st.floats(0.8, 20),
)
def test_a_lasting_rise_is_reported_at_its_third_step_and_the_next_after_it_is_over(
    seed: int, noise: float, begin: int, lasts: int, rise: float
) -> None:
    second = begin + lasts + 100

    def extra(step: int) -> float:
        return rise * (begin <= step < begin + lasts or second <= step)

    found = spikes(curve(seed, second + 1000, noise, extra))
    assert found == [begin + 2, second + 2]


def test_a_rollback_is_no_spike() -> None:
    """Repeated early steps have higher losses than the steps before the rollback."""
    watch = LossSpikeDetector()
    losses = list(curve(0, 1000, 0.01))
    steps = [*range(1000), *range(60, 1000)]
    assert [step for step in steps if watch.add(step, losses[step])] == []
    assert losses[60] > losses[999] + 1.0  # a spike without a rollback


def test_a_spike_is_a_warning_with_both_losses() -> None:
    watch = alarms()
    losses = [3.5] * BASELINE_STEPS + [math.nan, 5.25, 5.25, 5.25, 5.25]
    found = [alarm for step, loss in enumerate(losses) for alarm in watch.loss(step, loss)]
    assert [alarm.what for alarm in found] == ["loss_not_finite", "loss_spike"]
    assert "a lower learning rate" in found[0].text
    spike = found[1]
    assert (spike.level, spike.about) == ("warning", "val_loss")
    assert spike.text.startswith("The loss rose to 5.25 at step 53, from 3.5 in the 50 steps")

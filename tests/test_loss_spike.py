"""Loss spikes are reported once, and noise is not."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from examples import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.measure.alarms import Alarms
from nanogauge.measure.detectors import BASELINE_STEPS, LossSpikeDetector

LOGS = {
    "rtx4070_fineweb_train_log.txt": 101,
    "rtx4070_nanochat_d12_train_log.txt": 200,
}
"""Logs of undisturbed runs, and their minimum number of losses."""


def spikes(losses: Iterable[float]) -> list[int]:
    """Return the steps at which a spike is reported."""
    watch = LossSpikeDetector()
    return [step for step, loss in enumerate(losses) if watch.add(step, loss)]


def curve(
    seed: int, steps: int, noise: float, extra: Callable[[int], float] = lambda _: 0.0
) -> Iterable[float]:
    """Yield losses that fall from 10.8 towards 3.2 nats, with noise and an extra term."""
    draw = random.Random(seed)
    for step in range(steps):
        yield 3.2 + 7.6 / (1 + step / 40) ** 0.8 + draw.gauss(0, noise) + extra(step)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_shared(f"data/{name}")) for name in LOGS]
)
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


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    noise=st.sampled_from([0.0, 0.003, 0.03, 0.3]),
    odd=st.floats(0, 0.03),
)
def test_a_smooth_curve_with_noise_and_odd_batches_has_no_spike(
    seed: int, noise: float, odd: float
) -> None:
    """Up to 3 % of batches have a loss that is 2 nats higher."""
    draw = random.Random(seed)
    rise = [2.0 if draw.random() < odd and step % 2 else 0.0 for step in range(10_000)]
    assert spikes(curve(seed, 10_000, noise, lambda step: rise[step])) == []


@settings(max_examples=60, deadline=None)
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


def test_a_run_that_diverges_is_reported_once() -> None:
    assert spikes(curve(0, 5000, 0.02, lambda step: 3.0 * (step >= 1000))) == [1002]


def test_a_rollback_is_no_spike() -> None:
    """Repeated early steps have higher losses than the steps before the rollback."""
    watch = LossSpikeDetector()
    losses = list(curve(0, 1000, 0.01))
    steps = [*range(1000), *range(60, 1000)]
    assert [step for step in steps if watch.add(step, losses[step])] == []
    assert losses[60] > losses[999] + 1.0  # a spike without a rollback


def test_a_spike_is_a_warning_with_both_losses() -> None:
    watch = Alarms(predicted_total_seconds=None, device_bytes=None, slowdown_celsius=None)
    losses = [3.5] * BASELINE_STEPS + [math.nan, 5.25, 5.25, 5.25, 5.25]
    found = [alarm for step, loss in enumerate(losses) for alarm in watch.loss(step, loss)]
    assert [alarm.what for alarm in found] == ["loss_not_finite", "loss_spike"]
    assert "such an update is skipped" in found[0].text
    spike = found[1]
    assert (spike.level, spike.about) == ("warning", "val_loss")
    assert spike.text.startswith("The loss rose to 5.25 at step 53, from 3.5 in the 50 steps")

"""Energy from counters that reset, stall or are absent."""

from __future__ import annotations

import time

import pytest

from nanogauge.measure.gpus import EnergySum
from nanogauge.measure.sensors import NullSensors, open_sensors

pytestmark = pytest.mark.alone


def test_without_a_gpu_the_sensors_are_null() -> None:
    sensors = open_sensors(None, 10, time.monotonic)
    assert isinstance(sensors, NullSensors)
    assert sensors.reason == "no GPU"
    assert [c.field for c in sensors.changes()] == ["gpu"]
    assert sensors.changes() == sensors.close() == []


def test_a_reset_of_the_counter_without_power_samples_is_a_gap() -> None:
    energy = EnergySum(0.0, 1000.0, 0.5)
    assert energy.read(1.0, 1100.0) == (100.0, "counter")
    assert energy.read(2.0, 30.0) == (100.0, "counter")
    assert energy.gap_seconds(2.0) == 1.0
    assert energy.read(3.0, 130.0) == (200.0, "counter")
    assert energy.gap_seconds(3.0) == 1.0
    assert energy.integral_joules(3.0) is None


def test_energy_stalls_instead_of_falling_when_the_counter_is_behind_the_integral() -> None:
    """The integral, used while the counter could not be read, was a little too high."""
    energy = EnergySum(0.0, 0.0, 0.5)
    for tenth in range(11):
        energy.add_power(tenth / 10, 102.0)
    joules, source = energy.read(1.0, None)
    assert (joules, source) == (pytest.approx(102.0), "integral")
    assert energy.read(1.0, 100.0) == (joules, "counter")
    assert energy.read(1.1, 110.0) == (110.0, "counter")

"""Joules from counters that go around, fall, pause, or are not there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nanogauge.measure.absences import Absences
from nanogauge.measure.energy import EnergySum
from nanogauge.measure.gpu import NullSensors, open_sensors
from nanogauge.measure.rapl import Rapl

pytestmark = pytest.mark.alone

RANGE = 262_143_328_850  # microjoules after which a package's counter begins anew


def zone(root: Path, name: str, label: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder / "energy_uj"


def test_the_packages_of_a_machine_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    """Cores lie within their package, and a notebook's psys zone holds all of it once more."""
    labels = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"}
    parts = {"intel-rapl:0:0": "core", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0"}
    counters = [zone(tmp_path, *item, 7_000_000) for item in (labels | parts).items()]
    absences = Absences()
    rapl = Rapl(tmp_path, absences, 0.0)
    for counter in counters:
        counter.write_text("9500000")
    assert rapl.joules(1.0) == 5.0
    assert absences.drain() == []


def test_a_counter_that_goes_around_is_counted_on(tmp_path: Path) -> None:
    """A package at 100 W fills its counter in three quarters of an hour."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 30_000_000)
    rapl = Rapl(tmp_path, Absences(), 0.0)
    counter.write_text("70000000")
    assert rapl.joules(1.0) == 100.0


def test_after_a_pause_in_which_it_may_have_gone_around_twice_nothing_is_known(
    tmp_path: Path,
) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    absences = Absences()
    rapl = Rapl(tmp_path, absences, 0.0)
    counter.write_text("1000000")
    assert rapl.joules(200.0) == 1.0
    assert rapl.joules(4000.0) is None
    (change,) = absences.drain()
    assert change.midway and "more than once in 3800 s" in change.text


def test_a_counter_that_cannot_be_read_is_absent_until_it_can(tmp_path: Path) -> None:
    """Most systems show it to root alone: None with the system's reason, never 0 J."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    absences = Absences()
    rapl = Rapl(tmp_path, absences, 0.0)
    counter.unlink()
    assert rapl.joules(1.0) is None and rapl.joules(2.0) is None
    counter.write_text("5000000")
    assert rapl.joules(3.0) == 5.0
    lost, back = absences.drain()
    assert "from 1.0 s on" in lost.text and "No such file" in lost.text
    assert "from 3.0 s on" in back.text
    counter.unlink()
    shut = Absences()
    assert Rapl(tmp_path, shut, 0.0).joules(1.0) is None
    (change,) = shut.drain()
    assert not change.midway and "No such file" in change.text


def test_the_processor_is_measured_without_a_gpu(tmp_path: Path) -> None:
    """One line a second, and in it nothing but its joules and the time."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    begin = time.monotonic()
    sensors = open_sensors(None, 10, lambda: time.monotonic() - begin, tmp_path)
    counter.write_text("43000000")
    time.sleep(1.3)
    first, last = sensors.close()
    assert first.model_dump(exclude_none=True) == {
        "kind": "sensor",
        "elapsed_seconds": pytest.approx(1.0, abs=0.2),
        "cpu_package_joules": 42.0,
    }
    assert last.cpu_package_joules == 42.0
    assert sensors.reason is None and sensors.power_since_last() is None
    assert sensors.absent["power_watts"] == "no GPU"
    assert "cpu_package_joules" not in sensors.absent


def test_with_neither_gpu_nor_processor_the_sensors_are_null(tmp_path: Path) -> None:
    sensors = open_sensors(None, 10, time.monotonic, tmp_path)
    assert isinstance(sensors, NullSensors)
    assert sensors.reason == "no GPU"
    assert [c.field for c in sensors.changes()] == ["gpu", "cpu_package_joules"]
    assert sensors.changes() == sensors.close() == []


def test_a_counter_without_power_that_falls_leaves_a_gap() -> None:
    """What it had counted since it was read last is not known, by no other witness either."""
    energy = EnergySum(0.0, 1000.0, 0.5)
    assert energy.read(1.0, 1100.0) == (100.0, "counter")
    assert energy.read(2.0, 30.0) == (100.0, "counter")
    assert energy.gap_seconds(2.0) == 1.0
    assert energy.read(3.0, 130.0) == (200.0, "counter")
    assert energy.gap_seconds(3.0) == 1.0
    assert energy.integral_joules(3.0) is None


def test_a_counter_that_is_behind_the_integral_lets_energy_wait_not_fall() -> None:
    """While the counter could not be read the integral ran on, a little too fast."""
    energy = EnergySum(0.0, 0.0, 0.5)
    for tenth in range(11):
        energy.add_power(tenth / 10, 102.0)
    joules, source = energy.read(1.0, None)
    assert (joules, source) == (pytest.approx(102.0), "integral")
    assert energy.read(1.0, 100.0) == (joules, "counter")
    assert energy.read(1.1, 110.0) == (110.0, "counter")

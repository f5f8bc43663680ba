"""Several GPUs sampled together, on the scripted driver."""

from __future__ import annotations

from typing import Any

import pytest
from commands import build_fake_driver
from scripted import Run

from nanogauge.measure.alarms import Alarms
from nanogauge.schema import Sensor

pytestmark = pytest.mark.alone

GIB = 2**30
DIFFERENT = """
cards 3
0 watts 100
card 1 0 watts 150
card 2 0 watts 50
card 1 0 celsius 83
card 2 0 celsius 40
card 2 0 used_bytes 9663676416
card 0 0 sm_mhz 1980
card 1 0 throttle_bits 0x4
card 0 0 throttle_bits 0x20
card 2 0 utilization_percent 37
0 process 4242 1073741824 compute one
card 2 0 process 4243 6442450944 compute two
"""
ALL = [(0, 4242), ("12345678-1234-1234-1234-123456789abd", 4242), ("00000000:03:00.0", 4243)]
TROUBLE = """
cards 2
card 1 0 watts 300
card 1 1.2 lost 30
card 0 0 error fan 3
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    driver = build_fake_driver(tmp_path_factory.mktemp("driver"))
    return {
        "different": Run(driver, DIFFERENT, 2.3, ALL),
        "trouble": Run(driver, TROUBLE, 3.4, [(0, None), (1, None)]),
        "absent": Run(driver, "cards 2", 1.2, [(0, None), (7, None)]),
    }


def energies(said: dict[str, Any], name: str) -> list[float]:
    return [r[name] for r in said["readings"] if r[name] is not None]


def test_power_and_energy_of_several_gpus_are_sums(runs: dict[str, Run]) -> None:
    said = runs["different"].said
    last = said["readings"][-1]
    for name in ("power_watts", "power_min_watts", "power_max_watts"):
        assert last[name] == 300
    assert last["power_limit_watts"] == 600
    for name in ("energy_joules", "integral_joules"):
        assert last[name] == pytest.approx(300 * last["elapsed_seconds"], rel=0.1)
    assert last["energy_source"] == "counter"
    assert {spread["mean_watts"] for spread in said["spreads"][::2]} == {300}


def test_the_worst_value_is_given_with_the_number_of_its_gpu(runs: dict[str, Run]) -> None:
    """A mean temperature would hide the GPU that throttles and slows the others."""
    last = runs["different"].said["readings"][-1]
    assert (last["temperature_celsius"], last["hottest_card"]) == (83, 1)
    assert (last["device_used_bytes"], last["fullest_card"]) == (9 * GIB, 2)
    assert (last["sm_clock_hz"], last["slowest_card"]) == (1.98e9, 0)
    assert last["process_used_bytes"] == 6 * GIB, "each GPU's own process is measured"
    assert last["utilization"] == pytest.approx((0.97 + 0.97 + 0.37) / 3, abs=1e-3)
    assert last["throttle"] == ["thermal (software)", "power cap"]


def test_no_sum_is_given_if_one_gpu_is_lost(runs: dict[str, Run]) -> None:
    said = runs["trouble"].said
    assert energies(said, "power_watts")[0] == pytest.approx(400)
    assert said["readings"][-1]["power_watts"] is None
    assert said["readings"][-1]["energy_joules"] is None
    assert max(energies(said, "energy_joules")) < 400 * 2.1
    assert "GPU 1: the driver lost the GPU from 1." in said["absent"]["power_watts"]
    texts = [change["text"] for change in said["changes"]]
    assert any("fan is not measured from the start: GPU 0: " in text for text in texts), texts
    assert said["readings"][-1]["gap_seconds"] == pytest.approx(2.2, abs=0.5)


def test_no_sum_is_given_if_one_gpu_does_not_exist(runs: dict[str, Run]) -> None:
    said = runs["absent"].said
    assert energies(said, "power_watts") == []
    assert "GPU 1: the NVIDIA driver has no device 7" in said["absent"]["energy_joules"]


def test_an_alarm_names_its_gpu() -> None:
    """The memory of this process is left out: the fullest GPU may be of another process."""
    alarms = Alarms(predicted_total_seconds=None, device_bytes=10 * GIB, slowdown_celsius=90)
    reading = Sensor(
        temperature_celsius=88,
        hottest_card=1,
        device_used_bytes=10 * GIB,
        fullest_card=2,
        process_used_bytes=9 * GIB,
    )
    hot, full = alarms.sensor(reading)
    assert hot.text.startswith("GPU 1 is at 88 °C and slows down at 90 °C")
    assert full.text.startswith("10.0 of GPU 2's 10.0 GiB are in use: close other")

"""The sensors on a scripted driver library that the real nvidia-ml-py loads."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import build_fake_driver
from scripted import UUID_OF_TORCH, Run

from nanogauge.measure.gpus import EnergySum
from nanogauge.measure.nvml import throttle_words
from nanogauge.measure.sensors import open_sensors

pytestmark = pytest.mark.alone

GIB = 2**30

LONG = {
    "ramp": ("0 watts 100\n10 watts 600 ramp", 2.3, 20),
    "trouble": (
        """
        0 watts 100
        6 watts 220 ramp
        9 watts 150            # falls at once
        4 counter_joules 0     # the counter is reset
        1.3 error temperature 999 2.5
        0 error fan 3
        1.5 throttle_bits 0x24
        3.5 throttle_bits 0x3
        """,
        12.8,
        10,
    ),
    "hangs": ("1.3 hang", 5.0, 10),
    "dead": ("0 hang", 3.6, 10),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def long_runs(driver: Path) -> dict[str, Run]:
    """Run all long scripts beside each other and the other tests: they mostly sleep."""
    return {name: Run(driver, text, seconds, 0, hz) for name, (text, seconds, hz) in LONG.items()}


@pytest.fixture(scope="module")
def ramp(long_runs: dict[str, Run]) -> dict[str, Any]:
    return long_runs["ramp"].said


@pytest.fixture(scope="module")
def trouble(long_runs: dict[str, Run]) -> dict[str, Any]:
    return long_runs["trouble"].said


def scripted_joules(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Integrate 100 W + 50 W/s from one reading to the other."""
    t0, t1 = first["elapsed_seconds"], last["elapsed_seconds"]
    return 100 * (t1 - t0) + 25 * (t1**2 - t0**2)


def spent(readings: list[dict[str, Any]], name: str = "energy_joules") -> float:
    values = [r[name] for r in readings if r[name] is not None]
    assert values == sorted(values), "energy never falls"
    return float(values[-1] - values[0])


def test_power_and_energy_follow_the_script(ramp: dict[str, Any]) -> None:
    first, second, last = ramp["readings"]
    assert ramp["early"] == 2, "one reading a second, and the rest when the sensors are closed"
    assert ramp["reasons"] == {}
    middle = (first["elapsed_seconds"] + second["elapsed_seconds"]) / 2
    assert second["power_watts"] == pytest.approx(100 + 50 * middle, rel=0.02)
    assert second["power_max_watts"] - second["power_min_watts"] == pytest.approx(47.5, abs=3)
    for name in ("energy_joules", "integral_joules"):
        assert spent([first, last], name) == pytest.approx(scripted_joules(first, last), rel=0.01)
    assert last["energy_joules"] < 1000, "energy from before the run is not the run's"
    assert {r["energy_source"] for r in ramp["readings"]} == {"counter"}
    assert {r["gap_seconds"] for r in ramp["readings"]} == {None}


def test_each_power_sample_is_returned_once(ramp: dict[str, Any]) -> None:
    spreads, repeated = ramp["spreads"][::2], ramp["spreads"][1::2]
    assert set(repeated) == {None}
    assert all(s["min_watts"] < s["mean_watts"] < s["max_watts"] for s in spreads)
    assert spreads[2]["mean_watts"] == pytest.approx(100 + 50 * 1.25, rel=0.03)


def test_every_value_has_its_unit_and_every_program_is_named_and_counted_once(driver: Path) -> None:
    """A browser that computes and draws is in both lists."""
    own = Path("/proc/self/comm").read_text().strip()
    script = f"""
    0 process {os.getpid()} 1000 both
    0 process 4194305 2000 graphics
    0 process 4194306 3000 compute
    """
    said = Run(driver, script).said
    wanted = {
        "power_watts": 100.0,
        "power_min_watts": 100.0,
        "power_max_watts": 100.0,
        "power_limit_watts": 200.0,
        "temperature_celsius": 61.0,
        "fan": 0.45,
        "sm_clock_hz": 2.475e9,
        "memory_clock_hz": 10.501e9,
        "utilization": 0.97,
        "throttle": [],
        "pcie_generation": 4,
        "pcie_width": 16,
        "device_used_bytes": 5 * GIB,
        "process_used_bytes": 3 * GIB,
    }
    reading = said["readings"][-1]
    assert {name: reading[name] for name in wanted} == wanted
    assert said["reasons"] == {}
    info = said["info"]
    assert info.pop("absent") == {}
    assert info == {
        "name": "NVIDIA GeForce RTX 4070",
        "driver_version": "550.54.14",
        "cuda_version": [12, 4],
        "total_bytes": 12 * GIB,
        "max_sm_clock_hz": 3.105e9,
        "power_limit_watts": 200.0,
        "power_limit_default_watts": 215.0,
        "slowdown_celsius": 95.0,
        "used_by_others_bytes": 2 * GIB,
        "others": {own: 1000, "process 4194305": 2000, "process 4194306": 3000},
    }


def test_a_lost_gpu_ends_the_readings_alone(driver: Path) -> None:
    said = Run(driver, "1.2 lost", seconds=1.9).said
    assert [r["elapsed_seconds"] for r in said["readings"]] == pytest.approx([1.0, 1.9], abs=0.15)
    last = said["readings"][-1]
    assert last["gap_seconds"] == pytest.approx(0.7, abs=0.15), "the last line has the gap"
    assert last["energy_joules"] is None
    assert "GPU is lost" in said["reasons"]["gpu"] and " from 1." in said["reasons"]["gpu"]


def test_without_a_counter_energy_is_the_integral_of_power(driver: Path) -> None:
    said = Run(driver, "0 watts 100\n10 watts 600 ramp\n0 error energy 3", seconds=1.6).said
    first, last = said["readings"]
    assert spent([first, last]) == pytest.approx(scripted_joules(first, last), rel=0.01)
    assert last["energy_joules"] == last["integral_joules"]
    assert {r["energy_source"] for r in said["readings"]} == {"integral"}
    assert "Not Supported" in said["reasons"]["energy_counter"]


def test_a_gap_between_samples_adds_no_energy(driver: Path) -> None:
    said = Run(driver, "0 watts 150\n0 error energy 3", jump=(0.2, 3600.0), seconds=0.5).said
    last = said["readings"][-1]
    assert last["elapsed_seconds"] > 3600
    assert last["energy_joules"] < 150 * 2
    assert last["gap_seconds"] == pytest.approx(3600, abs=0.5)


def test_a_field_that_is_not_supported_is_none_with_its_reason(driver: Path) -> None:
    said = Run(driver, "0 error temperature 3\n0 error utilization 3\n0 error version 3\n0 error graphics 3").said
    reading = said["readings"][-1]
    assert reading["temperature_celsius"] is None and reading["utilization"] is None
    assert reading["power_watts"] == 100.0 and reading["sm_clock_hz"] == 2.475e9
    assert set(said["reasons"]) == {"temperature_celsius", "utilization"}
    assert "Not Supported" in said["reasons"]["temperature_celsius"]
    for name in ("driver_version", "others"):
        assert said["info"][name] is None
        assert "Not Supported" in said["info"]["absent"][name]


def test_neither_counter_nor_power_gives_no_energy_and_a_hidden_process_no_memory(driver: Path) -> None:
    """In a container the driver lists the host's process numbers."""
    said = Run(driver, "0 error energy 3\n0 error power_usage 3\n0 self_bytes -1").said
    reading = said["readings"][-1]
    assert reading["energy_joules"] is None and reading["energy_source"] is None
    assert reading["process_used_bytes"] is None
    assert set(said["reasons"]) == {"power_watts", "energy_counter", "process_used_bytes"}
    assert "container" in said["reasons"]["process_used_bytes"]


def test_the_memory_of_a_launcher_is_that_of_its_descendants(driver: Path) -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        said = Run(driver, f"0 process {child} 2000 compute", device=[(UUID_OF_TORCH, launcher.pid)]).said
        os.kill(child, signal.SIGKILL)
    assert said["readings"][-1]["process_used_bytes"] == 2000


def test_the_idle_gpu_is_measured_for_the_given_time(driver: Path) -> None:
    script = "0 watts 15\n2 watts 25 ramp\n0 utilization_percent 4"
    said = Run(driver, script, seconds=1.2, idle=True).said
    assert said["waited"] == pytest.approx(1.2, abs=0.3)
    assert said["idle"] == {"power_watts": pytest.approx(18, rel=0.03), "utilization": 0.04}
    hidden = Run(driver, "0 error power_usage 3", seconds=0.2, idle=True).said["idle"]
    assert hidden["power_watts"] is None


def test_an_unknown_device_is_not_replaced_by_another(driver: Path) -> None:
    said = Run(driver, seconds=0, device="GPU-00000000-0000-0000-0000-000000000000").said
    assert said["reasons"]["gpu"].startswith("the NVIDIA driver has no device GPU-0000")
    assert said["readings"] == []


def test_without_a_driver_there_are_no_readings_and_one_reason(tmp_path: Path) -> None:
    # An empty file hides the library of a machine that has one.
    (tmp_path / "libnvidia-ml.so.1").touch()
    said = Run(tmp_path, seconds=0).said
    assert said["readings"] == []
    assert said["reasons"]["gpu"].startswith("no NVIDIA driver")
    assert [c["midway"] for c in said["changes"]] == [False]


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
0 process 4242 1073741824 compute
card 2 0 process 4243 6442450944 compute
"""
ALL = [(0, 4242), ("12345678-1234-1234-1234-123456789abd", 4242), ("00000000:03:00.0", 4243)]
TROUBLE = """
cards 2
card 1 0 watts 300
card 1 1.2 lost
card 0 0 error fan 3
"""


@pytest.fixture(scope="module")
def several(driver: Path) -> dict[str, Run]:
    return {"different": Run(driver, DIFFERENT, 2.3, ALL), "trouble": Run(driver, TROUBLE, 3.4, [(0, None), (1, None)])}


def energies(said: dict[str, Any], name: str) -> list[float]:
    return [r[name] for r in said["readings"] if r[name] is not None]


def test_power_and_energy_of_several_gpus_are_sums(several: dict[str, Run]) -> None:
    said = several["different"].said
    last = said["readings"][-1]
    for name in ("power_watts", "power_min_watts", "power_max_watts"):
        assert last[name] == 300
    assert last["power_limit_watts"] == 600
    for name in ("energy_joules", "integral_joules"):
        assert last[name] == pytest.approx(300 * last["elapsed_seconds"], rel=0.1)
    assert last["energy_source"] == "counter"
    assert {spread["mean_watts"] for spread in said["spreads"][::2]} == {300}


def test_the_worst_value_is_given_with_the_number_of_its_gpu(several: dict[str, Run]) -> None:
    """A mean temperature would hide the GPU that throttles and slows the others."""
    last = several["different"].said["readings"][-1]
    assert (last["temperature_celsius"], last["hottest_card"]) == (83, 1)
    assert (last["device_used_bytes"], last["fullest_card"]) == (9 * GIB, 2)
    assert (last["sm_clock_hz"], last["slowest_card"]) == (1.98e9, 0)
    assert last["process_used_bytes"] == 6 * GIB, "each GPU's own process is measured"
    assert last["utilization"] == pytest.approx((0.97 + 0.97 + 0.37) / 3, abs=1e-3)
    assert last["throttle"] == ["thermal (software)", "power cap"]


def test_no_sum_is_given_if_one_gpu_is_lost(several: dict[str, Run]) -> None:
    said = several["trouble"].said
    assert energies(said, "power_watts")[0] == pytest.approx(400)
    assert said["readings"][-1]["power_watts"] is None
    assert said["readings"][-1]["energy_joules"] is None
    assert max(energies(said, "energy_joules")) < 400 * 2.1
    assert "GPU 1: the driver lost the GPU from 1." in said["reasons"]["gpu"]
    texts = [change["text"] for change in said["changes"]]
    assert any("fan is not measured from the start: GPU 0: " in text for text in texts), texts
    assert said["readings"][-1]["gap_seconds"] == pytest.approx(2.2, abs=0.5)


def test_without_a_gpu_nothing_is_measured() -> None:
    sensors = open_sensors(None, 10, time.monotonic)
    assert sensors.reasons() == {"gpu": "no GPU"}
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


def test_sampling_takes_little_processor_time_and_no_torch(trouble: dict[str, Any]) -> None:
    """Ten samples a second take 0.1-0.2 % of a core, on some virtual machines 15 times as much."""
    assert 0 < trouble["cpu_seconds"] / 12.8 <= 0.03
    assert not trouble["torch"]


def test_energy_neither_falls_nor_jumps_when_the_counter_is_reset(trouble: dict[str, Any]) -> None:
    """The power rises linearly from 100 W to 220 W at 6 s and falls to 150 W at 9 s."""
    readings = trouble["readings"]

    def scripted(t: float) -> float:
        rising, high = min(t, 6), min(max(t - 6, 0), 3)
        return 100 * rising + 10 * rising**2 + 220 * high + 150 * max(t - 9, 0)

    joules = scripted(readings[-1]["elapsed_seconds"]) - scripted(readings[0]["elapsed_seconds"])
    assert spent(readings) == pytest.approx(joules, rel=0.01)
    assert spent(readings, "integral_joules") == pytest.approx(joules, rel=0.01)
    sources = [r["energy_source"] for r in readings]
    assert sources.count("integral") == 1 and sources[-1] == "counter"


def test_a_temporary_error_leaves_its_field_absent_for_some_seconds(trouble: dict[str, Any]) -> None:
    """A field that is not supported stays absent; after any other error it is read again."""
    readings = trouble["readings"]
    warm = [r["elapsed_seconds"] for r in readings if r["temperature_celsius"] is not None]
    assert [t for t in warm if 1.5 < t < 11.5] == []
    assert warm[0] < 1.2 and warm[-1] > 12
    assert {r["fan"] for r in readings} == {None}
    assert all(r["power_watts"] and r["utilization"] for r in readings)
    assert set(trouble["reasons"]) == {"fan"}


def test_each_change_is_reported_once_with_its_time_and_reason(trouble: dict[str, Any]) -> None:
    changes = [(c["field"], c["midway"]) for c in trouble["changes"]]
    assert changes == [("fan", False), ("temperature_celsius", True), ("temperature_celsius", True)]
    fan, lost, back = [c["text"] for c in trouble["changes"]]
    assert "from the start" in fan and "Not Supported" in fan
    assert " from 2." in lost and "Unknown Error" in lost
    assert "is measured from 1" in back


def test_throttle_reasons_are_words_and_idling_is_none(trouble: dict[str, Any]) -> None:
    at = {round(r["elapsed_seconds"]): r["throttle"] for r in trouble["readings"]}
    assert at[1] == [] and at[2] == at[3] == ["power cap", "thermal (software)"]
    assert at[4] == [] and at[12] == []
    assert throttle_words(0x48) == ["hardware slow-down", "thermal (hardware)"]
    assert throttle_words(0x190) == ["sync boost", "power brake", "display clock"]
    assert throttle_words(0x10001) == ["reason 0x10000"]


def test_a_driver_that_hangs_delays_neither_the_run_nor_its_end(long_runs: dict[str, Run]) -> None:
    said = long_runs["hangs"].said
    assert said["close_seconds"] < 1.5
    assert "does not answer from 1." in said["reasons"]["driver"]
    assert len(said["readings"]) == 1
    assert [(c["field"], c["midway"]) for c in said["changes"]] == [("driver", True)]


def test_a_driver_that_hangs_from_the_start_is_not_waited_for(long_runs: dict[str, Run]) -> None:
    said = long_runs["dead"].said
    assert said["open_seconds"] < 3.5 and said["close_seconds"] < 1.5
    assert said["readings"] == [] and said["reasons"] == {"driver": "the driver does not answer"}
    assert [(c["field"], c["midway"]) for c in said["changes"]] == [("driver", False)]

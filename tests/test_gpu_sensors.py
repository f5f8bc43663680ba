"""The sensors against a scripted driver library, which the real nvidia-ml-py finds by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import build_fake_driver

ROOT = Path(__file__).parents[1]
UUID_OF_TORCH = "12345678-1234-1234-1234-123456789abc"

SAMPLE = """
import json, sys, time
from nanogauge.measure.gpu import MEASURED, driver_info, open_sensors
device, seconds, jump_after, jump_seconds = json.loads(sys.argv[1])
begin = time.monotonic()
def clock():
    t = time.monotonic() - begin
    return t + jump_seconds if t > jump_after else t
sensors = open_sensors(device, 20, clock)
cpu = time.process_time()
time.sleep(seconds)
cpu = time.process_time() - cpu
early = sensors.readings()
closing = time.monotonic()
late = sensors.close()
print(json.dumps({
    "readings": [r.model_dump() for r in early + late], "early": len(early),
    "absent": dict(sensors.absent), "reason": sensors.reason, "cpu_seconds": cpu,
    "close_seconds": time.monotonic() - closing, "measured": MEASURED,
    "info": vars(driver_info(device)) if not sensors.reason else None,
    "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


def sample(
    folder: Path,
    seconds: float = 0.3,
    device: str | int = UUID_OF_TORCH,
    jump: tuple[float, float] = (1e9, 0),
    **script: object,
) -> dict[str, Any]:
    """What the sensors of a process say that runs for so long on the scripted driver."""
    variables = {f"FAKE_NVML_{name.upper()}": str(value) for name, value in script.items()}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, json.dumps([device, seconds, *jump])],
        env={**os.environ, **variables, "LD_LIBRARY_PATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def ramp(driver: Path) -> dict[str, Any]:
    return sample(driver, seconds=2.3, watts=100, watts_per_second=50)


def test_power_and_energy_are_what_the_driver_counted(ramp: dict[str, Any]) -> None:
    """Milliwatts and millijoules become W and J, the counter counts from the start of the run."""
    first, second, last = ramp["readings"]
    assert ramp["early"] == 2, "one reading a second, and the rest when the sensors are closed"
    assert ramp["absent"] == {} and ramp["reason"] is None
    middle = (first["elapsed_seconds"] + second["elapsed_seconds"]) / 2
    assert second["power_watts"] == pytest.approx(100 + 50 * middle, rel=0.01)
    t0, t1 = first["elapsed_seconds"], last["elapsed_seconds"]
    scripted_joules = 100 * (t1 - t0) + 25 * (t1**2 - t0**2)
    counted_joules = last["energy_joules"] - first["energy_joules"]
    assert counted_joules == pytest.approx(scripted_joules, rel=0.01)
    assert last["energy_joules"] < 1000, "energy from before the run is not the run's"
    assert {r["energy_source"] for r in ramp["readings"]} == {"counter"}


def test_every_number_arrives_in_its_unit(driver: Path) -> None:
    """MHz become Hz, percent a fraction; of the processes, this one's memory is taken."""
    said = sample(driver)
    wanted = {
        "power_watts": 100.0,
        "power_limit_watts": 200.0,
        "temperature_celsius": 61.0,
        "sm_clock_hz": 2.475e9,
        "utilization": 0.97,
        "device_used_bytes": 5 * 2**30,
        "process_used_bytes": 3 * 2**30,
    }
    reading = said["readings"][-1]
    assert {name: reading[name] for name in wanted} == pytest.approx(wanted)
    assert set(said["measured"]) == {*wanted, "energy_joules"}
    info = said["info"]
    assert info.pop("absent") == {}
    assert info == {
        "name": "NVIDIA GeForce RTX 4070",
        "driver_version": "550.54.14",
        "total_bytes": 12 * 2**30,
        "max_sm_clock_hz": 3.105e9,
        "power_limit_watts": 200.0,
        "used_by_others_bytes": 2 * 2**30,
    }


def test_sampling_costs_next_to_nothing(ramp: dict[str, Any]) -> None:
    """The sensors must not take a core from the loop, nor load torch into a measuring process."""
    assert ramp["cpu_seconds"] < 0.02 * 2.3, "at 20 samples a second, under 2 % of one core"
    assert not ramp["torch"]


def test_without_a_counter_energy_is_the_integral_of_power(driver: Path) -> None:
    """Cards before Volta have no energy counter; the source of the number is named."""
    said = sample(driver, seconds=1.6, watts=100, watts_per_second=50, unsupported="energy")
    first, last = said["readings"]
    t0, t1 = first["elapsed_seconds"], last["elapsed_seconds"]
    scripted_joules = 100 * (t1 - t0) + 25 * (t1**2 - t0**2)
    assert last["energy_joules"] - first["energy_joules"] == pytest.approx(
        scripted_joules, rel=0.01
    )
    assert {r["energy_source"] for r in said["readings"]} == {"integral"}
    assert "Not Supported" in said["absent"]["energy_counter"]
    assert "energy_joules" not in said["absent"]


def test_a_counter_that_fails_midway_is_carried_on_by_the_integral(driver: Path) -> None:
    """Energy never falls back: the integral goes on from the counter's last number."""
    said = sample(driver, seconds=1.6, watts=150, energy_lost_after_calls=25)
    first, last = said["readings"]
    assert [r["energy_source"] for r in said["readings"]] == ["counter", "integral"]
    spent_joules = 150 * (last["elapsed_seconds"] - first["elapsed_seconds"])
    assert last["energy_joules"] - first["energy_joules"] == pytest.approx(spent_joules, rel=0.02)
    assert " s on: Not Supported" in said["absent"]["energy_counter"]


def test_a_gap_between_samples_is_not_filled_with_invented_power(driver: Path) -> None:
    """A trapezoid over an hour in which nothing was sampled would invent an hour of energy."""
    said = sample(driver, jump=(0.2, 3600.0), seconds=0.5, watts=150, unsupported="energy")
    assert said["readings"][-1]["elapsed_seconds"] > 3600
    assert said["readings"][-1]["energy_joules"] < 150 * 2
    assert "leaves out 3600." in said["absent"]["energy_gaps"]


def test_one_number_that_is_not_supported_leaves_the_others(driver: Path) -> None:
    """GeForce drivers leave numbers out; what is missing is None with its reason, never 0."""
    said = sample(driver, unsupported="temperature,utilization,version")
    reading = said["readings"][-1]
    assert reading["temperature_celsius"] is None and reading["utilization"] is None
    assert reading["power_watts"] == 100.0 and reading["sm_clock_hz"] == 2.475e9
    assert set(said["absent"]) == {"temperature_celsius", "utilization"}
    assert "Not Supported" in said["absent"]["temperature_celsius"]
    assert said["info"]["driver_version"] is None
    assert "Not Supported" in said["info"]["absent"]["driver_version"]


def test_neither_counter_nor_power_gives_no_energy(driver: Path) -> None:
    said = sample(driver, unsupported="energy,power_usage")
    reading = said["readings"][-1]
    assert reading["energy_joules"] is None and reading["energy_source"] is None
    assert {"power_watts", "energy_joules", "energy_counter"} <= set(said["absent"])


def test_a_process_the_driver_does_not_list_has_unknown_memory(driver: Path) -> None:
    """In a container the driver lists the host's process numbers: 0 bytes would be a lie."""
    said = sample(driver, hides_process=1)
    assert said["readings"][-1]["process_used_bytes"] is None
    assert "container" in said["absent"]["process_used_bytes"]


def test_a_gpu_that_is_lost_midway_ends_the_readings_and_nothing_else(driver: Path) -> None:
    """A card that falls off the bus must not end, or stop, the run that writes its log."""
    said = sample(driver, seconds=1.5, lost_after_calls=25)
    assert len(said["readings"]) == 2
    assert 1.2 < said["readings"][-1]["elapsed_seconds"] < 1.45
    assert "GPU is lost" in said["reason"] and " from 1." in said["reason"]
    assert set(said["absent"]) >= set(said["measured"])


def test_a_driver_that_hangs_cannot_hold_up_the_end_of_the_run(driver: Path) -> None:
    """The driver's thread may wait for ever; the loop leaves it behind and says so."""
    said = sample(driver, seconds=1.4, hangs_after_calls=23)
    assert said["close_seconds"] < 2
    assert "has not answered since 1." in said["reason"]
    assert len(said["readings"]) == 1


@pytest.mark.parametrize("device", [0, "GPU-" + UUID_OF_TORCH, "00000000:01:00.0"])
def test_a_device_is_found_by_each_of_its_names(driver: Path, device: str | int) -> None:
    assert sample(driver, seconds=0, device=device)["reason"] is None


def test_an_unknown_device_is_none_of_the_others(driver: Path) -> None:
    """Falling back to the first card would measure somebody else's."""
    said = sample(driver, seconds=0, device="GPU-00000000-0000-0000-0000-000000000000")
    assert said["reason"].startswith("the NVIDIA driver has no device GPU-0000")
    assert said["readings"] == []


def test_without_a_driver_there_are_no_readings_and_one_reason(tmp_path: Path) -> None:
    """A laptop without a GPU runs the same program; each field says why it is empty."""
    # An empty file hides the library of a machine that has one.
    (tmp_path / "libnvidia-ml.so.1").touch()
    said = sample(tmp_path, seconds=0)
    assert said["readings"] == []
    assert said["reason"].startswith("no NVIDIA driver")
    assert set(said["absent"]) == set(said["measured"])

"""The sensors against a scripted driver library, which the real nvidia-ml-py finds by its name."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import build_fake_driver
from scripted import UUID_OF_TORCH, Run

from nanogauge.measure.nvml import throttle_words

pytestmark = pytest.mark.alone

GIB = 2**30

LONG = {
    "ramp": ("0 watts 100\n10 watts 600 ramp", 2.3, 20),
    "trouble": (
        """
        0 watts 100
        6 watts 220 ramp
        9 watts 150            # falls at once
        4 counter_joules 0     # the counter begins anew
        1.3 error temperature 999 2.5
        0 error fan 3
        0 error event_reasons 13   # an older driver
        0 error compute 13
        1.5 throttle_bits 0x24
        3.5 throttle_bits 0x3
        """,
        12.8,
        10,
    ),
    "lost": ("1.5 lost 3\n3 counter_joules 0", 7.0, 10),
    "hangs": ("1.3 hang", 5.0, 10),
    "dead": ("0 hang", 3.6, 10),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def long_runs(driver: Path) -> dict[str, Run]:
    """They mostly sleep: all at once take as long as the longest."""
    return {name: Run(driver, text, seconds, 0, hz) for name, (text, seconds, hz) in LONG.items()}


@pytest.fixture(scope="module")
def ramp(long_runs: dict[str, Run]) -> dict[str, Any]:
    return long_runs["ramp"].said


@pytest.fixture(scope="module")
def trouble(long_runs: dict[str, Run]) -> dict[str, Any]:
    return long_runs["trouble"].said


def scripted_joules(first: dict[str, Any], last: dict[str, Any]) -> float:
    """The integral of 100 W + 50 W/s from one reading to the other."""
    t0, t1 = first["elapsed_seconds"], last["elapsed_seconds"]
    return 100 * (t1 - t0) + 25 * (t1**2 - t0**2)


def spent(readings: list[dict[str, Any]], name: str = "energy_joules") -> float:
    values = [r[name] for r in readings if r[name] is not None]
    assert values == sorted(values), "energy never falls"
    return float(values[-1] - values[0])


def test_power_and_energy_are_what_the_driver_counted(ramp: dict[str, Any]) -> None:
    """Milliwatts and millijoules become W and J, the counter counts from the start of the run."""
    first, second, last = ramp["readings"]
    assert ramp["early"] == 2, "one reading a second, and the rest when the sensors are closed"
    assert ramp["reason"] is None
    middle = (first["elapsed_seconds"] + second["elapsed_seconds"]) / 2
    assert second["power_watts"] == pytest.approx(100 + 50 * middle, rel=0.02)
    assert second["power_max_watts"] - second["power_min_watts"] == pytest.approx(47.5, abs=3)
    for name in ("energy_joules", "integral_joules"):
        assert spent([first, last], name) == pytest.approx(scripted_joules(first, last), rel=0.01)
    assert last["energy_joules"] < 1000, "energy from before the run is not the run's"
    assert {r["energy_source"] for r in ramp["readings"]} == {"counter"}
    assert {r["gap_seconds"] for r in ramp["readings"]} == {None}


def test_each_sample_of_power_is_told_once(ramp: dict[str, Any]) -> None:
    """A step's power is of the samples that fell into it; without one it is None, not the last."""
    spreads, repeated = ramp["spreads"][::2], ramp["spreads"][1::2]
    assert set(repeated) == {None}
    assert all(s["min_watts"] < s["mean_watts"] < s["max_watts"] for s in spreads)
    assert spreads[1]["n"] == pytest.approx(10, abs=2), "half a second at 20 Hz"
    assert spreads[2]["mean_watts"] == pytest.approx(100 + 50 * 1.25, rel=0.03)


def test_every_number_arrives_in_its_unit(driver: Path) -> None:
    """MHz become Hz, percent a fraction; of the processes, this one's memory is taken."""
    said = Run(driver).said
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
    energies = {"energy_joules", "integral_joules"}
    assert set(said["measured"]) == {*wanted, *energies}
    assert said["absent"] == {}
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
        "max_pcie_generation": 4,
        "max_pcie_width": 16,
        "used_by_others_bytes": 2 * GIB,
        "others": {Path("/proc/1/comm").read_text().strip(): GIB},
    }


def waking_seconds(wakings: int) -> float:
    """What a thread takes of a core that wakes so often, ten times a second, and does nothing."""
    spent: list[float] = []

    def wake() -> None:
        for _ in range(wakings):
            threading.Event().wait(0.1)
        spent.append(time.thread_time())

    thread = threading.Thread(target=wake)
    thread.start()
    thread.join()
    return spent[0]


def test_sampling_costs_next_to_nothing(trouble: dict[str, Any]) -> None:
    """The sensors must not take a core from the loop, nor load torch into a measuring process.

    Ten samples a second cost one to two thousandths of a core, on a machine where a thread that
    only wakes as often costs half of one. Waking costs fifteen times that on some virtual machines,
    and sampling there 25 to 33 thousandths: what counts is how many wakings a sample is worth.
    """
    wakings = 40
    waking_share = 10 * waking_seconds(wakings) / wakings
    assert 0 < trouble["cpu_seconds"] / 12.8 <= max(0.004, 10 * waking_share)
    assert not trouble["torch"]


def test_a_counter_that_begins_anew_lets_energy_neither_fall_nor_jump(
    trouble: dict[str, Any],
) -> None:
    """Both sums stay within 1 % of the scripted integral over 12 s, a falling counter among them.

    220 W falls to 150 W at 9 s; the power rises from 100 W on a line until 6 s.
    """
    readings = trouble["readings"]

    def scripted(t: float) -> float:
        rising, high = min(t, 6), min(max(t - 6, 0), 3)
        return 100 * rising + 10 * rising**2 + 220 * high + 150 * max(t - 9, 0)

    joules = scripted(readings[-1]["elapsed_seconds"]) - scripted(readings[0]["elapsed_seconds"])
    assert spent(readings) == pytest.approx(joules, rel=0.01)
    assert spent(readings, "integral_joules") == pytest.approx(joules, rel=0.01)
    sources = [r["energy_source"] for r in readings]
    assert sources.count("integral") == 1 and sources[-1] == "counter"


def test_an_error_that_passes_costs_its_field_some_seconds_and_nothing_else(
    trouble: dict[str, Any],
) -> None:
    """What the driver does not support stays absent; any other error is asked about again."""
    readings = trouble["readings"]
    warm = [r["elapsed_seconds"] for r in readings if r["temperature_celsius"] is not None]
    assert [t for t in warm if 1.5 < t < 11.5] == []
    assert warm[0] < 1.2 and warm[-1] > 12
    assert {r["fan"] for r in readings} == {None}
    assert all(r["power_watts"] and r["utilization"] for r in readings)
    assert set(trouble["absent"]) == {"fan"}


def test_each_change_is_told_once_with_since_when_and_why(trouble: dict[str, Any]) -> None:
    told = [(c["field"], c["midway"]) for c in trouble["changes"]]
    assert told == [("fan", False), ("temperature_celsius", True), ("temperature_celsius", True)]
    fan, lost, back = [c["text"] for c in trouble["changes"]]
    assert "from the start" in fan and "Not Supported" in fan
    assert " from 2." in lost and "Unknown Error" in lost
    assert "is measured from 1" in back


def test_throttling_is_told_in_words_and_idling_is_none(trouble: dict[str, Any]) -> None:
    """Also by drivers that know the older name of the call alone."""
    at = {round(r["elapsed_seconds"]): r["throttle"] for r in trouble["readings"]}
    assert at[1] == [] and at[2] == at[3] == ["power cap", "thermal (software)"]
    assert at[4] == [] and at[12] == []
    assert throttle_words(0x48) == ["hardware slow-down", "thermal (hardware)"]
    assert throttle_words(0x190) == ["sync boost", "power brake", "display clock"]
    assert throttle_words(0x10001) == ["reason 0x10000"]


def test_a_gpu_that_is_lost_is_measured_again_when_it_is_back(long_runs: dict[str, Run]) -> None:
    """Nobody knows what it drew meanwhile: that is a gap, whatever its counter says then."""
    said = long_runs["lost"].said
    readings = said["readings"]
    times = [r["elapsed_seconds"] for r in readings]
    before, after = [t for t in times if t < 3], [t for t in times if t > 3]
    assert before[-1] == pytest.approx(1.5, abs=0.2), "the last samples are not thrown away"
    assert after[0] - before[-1] > 2, "no reading while there is nothing to read"
    gap = readings[-1]["gap_seconds"]
    assert readings[0]["gap_seconds"] is None and gap == pytest.approx(3.1, abs=0.4)
    seen = times[-1] - times[0] - gap
    assert spent(readings) == pytest.approx(100 * seen, rel=0.02)
    assert spent(readings, "integral_joules") == pytest.approx(100 * seen, rel=0.02)
    assert [(c["field"], c["midway"]) for c in said["changes"]] == [("gpu", True)] * 2
    assert "GPU is lost" in said["changes"][0]["text"] and " from 1." in said["changes"][0]["text"]
    assert said["reason"] is None


def test_a_gpu_that_stays_lost_ends_the_readings_and_nothing_else(driver: Path) -> None:
    """A card that falls off the bus must not end, or stop, the run that writes its log."""
    said = Run(driver, "1.2 lost 1e9", seconds=1.9).said
    assert [r["elapsed_seconds"] for r in said["readings"]] == pytest.approx(
        [1.0, 1.2, 1.9], abs=0.15
    )
    last = said["readings"][-1]
    assert last["gap_seconds"] == pytest.approx(0.7, abs=0.15), "the last line tells of the gap"
    assert last["energy_joules"] is None
    assert "GPU is lost" in said["reason"] and " from 1." in said["reason"]
    assert set(said["absent"]) >= set(said["measured"])


def test_a_driver_that_hangs_holds_up_neither_the_run_nor_its_end(
    long_runs: dict[str, Run],
) -> None:
    """The sampling thread may wait for ever; the loop leaves it behind and says so."""
    said = long_runs["hangs"].said
    assert said["close_seconds"] < 1.5
    assert "does not answer from 1." in said["reason"]
    assert len(said["readings"]) == 1
    assert [(c["field"], c["midway"]) for c in said["changes"]] == [("driver", True)]
    assert set(said["absent"]) >= set(said["measured"])


def test_a_driver_that_hangs_from_the_start_is_not_waited_for(long_runs: dict[str, Run]) -> None:
    said = long_runs["dead"].said
    assert said["open_seconds"] < 3.5 and said["close_seconds"] < 1.5
    assert said["readings"] == [] and said["reason"] == "the driver does not answer"
    assert [(c["field"], c["midway"]) for c in said["changes"]] == [("driver", False)]


def test_without_a_counter_energy_is_the_integral_of_power(driver: Path) -> None:
    """Cards before Volta have no energy counter; the source of the number is named."""
    said = Run(driver, "0 watts 100\n10 watts 600 ramp\n0 error energy 3", seconds=1.6).said
    first, last = said["readings"]
    assert spent([first, last]) == pytest.approx(scripted_joules(first, last), rel=0.01)
    assert last["energy_joules"] == last["integral_joules"]
    assert {r["energy_source"] for r in said["readings"]} == {"integral"}
    assert "Not Supported" in said["absent"]["energy_counter"]
    assert "energy_joules" not in said["absent"]


def test_a_counter_that_fails_midway_is_carried_on_by_the_integral(driver: Path) -> None:
    """Energy never falls back: the integral goes on from the counter's last number."""
    said = Run(driver, "0 watts 150\n1.2 error energy 3", seconds=1.6).said
    first, last = said["readings"]
    assert [r["energy_source"] for r in said["readings"]] == ["counter", "integral"]
    joules = 150 * (last["elapsed_seconds"] - first["elapsed_seconds"])
    assert spent([first, last]) == pytest.approx(joules, rel=0.02)
    assert " s on: Not Supported" in said["absent"]["energy_counter"]


def test_a_gap_between_samples_is_not_filled_with_invented_power(driver: Path) -> None:
    """A trapezoid over an hour in which nothing was sampled would invent an hour of energy."""
    said = Run(driver, "0 watts 150\n0 error energy 3", jump=(0.2, 3600.0), seconds=0.5).said
    last = said["readings"][-1]
    assert last["elapsed_seconds"] > 3600
    assert last["energy_joules"] < 150 * 2
    assert last["gap_seconds"] == pytest.approx(3600, abs=0.5)
    assert "leaves out 3600." in said["absent"]["energy_gaps"]


def test_one_number_that_is_not_supported_leaves_the_others(driver: Path) -> None:
    """GeForce drivers leave numbers out; what is missing is None with its reason, never 0."""
    said = Run(
        driver,
        "0 error temperature 3\n0 error utilization 3\n0 error version 3\n0 error graphics 3",
    ).said
    reading = said["readings"][-1]
    assert reading["temperature_celsius"] is None and reading["utilization"] is None
    assert reading["power_watts"] == 100.0 and reading["sm_clock_hz"] == 2.475e9
    assert set(said["absent"]) == {"temperature_celsius", "utilization"}
    assert "Not Supported" in said["absent"]["temperature_celsius"]
    for name in ("driver_version", "others"):
        assert said["info"][name] is None
        assert "Not Supported" in said["info"]["absent"][name]


def test_neither_counter_nor_power_gives_no_energy(driver: Path) -> None:
    said = Run(driver, "0 error energy 3\n0 error power_usage 3").said
    reading = said["readings"][-1]
    assert reading["energy_joules"] is None and reading["energy_source"] is None
    assert {"power_watts", "power_min_watts", "integral_joules", "energy_joules"} <= set(
        said["absent"]
    )


def test_a_process_the_driver_does_not_list_has_unknown_memory(driver: Path) -> None:
    """In a container the driver lists the host's process numbers: 0 bytes would be a lie."""
    said = Run(driver, "0 self_bytes -1").said
    assert said["readings"][-1]["process_used_bytes"] is None
    assert "container" in said["absent"]["process_used_bytes"]


def test_other_programs_are_told_by_name_and_each_process_once(driver: Path) -> None:
    """A browser that computes and draws is in both lists; nobody's name is its number."""
    script = f"""
    0 process {os.getpid()} 1000 both -
    0 process 4194305 2000 graphics /usr/lib/xorg/Xorg
    0 process 4194306 3000 compute -
    """
    info = Run(driver, script).said["info"]
    own = Path("/proc/self/comm").read_text().strip()
    assert info["others"] == {own: 1000, "Xorg": 2000, "process 4194306": 3000}


def test_the_idle_card_is_measured_for_as_long_as_asked(driver: Path) -> None:
    script = "0 watts 15\n2 watts 25 ramp\n0 utilization_percent 4"
    said = Run(driver, script, seconds=1.2, idle=True).said
    assert said["waited"] == pytest.approx(1.2, abs=0.3)
    idle = said["idle"]
    assert idle["power_watts"] == pytest.approx(18, rel=0.03)
    assert (idle["utilization"], idle["reason"]) == (0.04, None)
    assert idle["seconds"] == pytest.approx(1.2, abs=0.2)
    hidden = Run(driver, "0 error power_usage 3", seconds=0.2, idle=True).said["idle"]
    assert hidden["power_watts"] is None and "Not Supported" in hidden["reason"]


@pytest.mark.parametrize("device", ["GPU-" + UUID_OF_TORCH, "00000000:01:00.0"])
def test_a_device_is_found_by_each_of_its_names(driver: Path, device: str | int) -> None:
    assert Run(driver, seconds=0, device=device).said["reason"] is None


def test_an_unknown_device_is_none_of_the_others(driver: Path) -> None:
    """Falling back to the first card would measure somebody else's."""
    said = Run(driver, seconds=0, device="GPU-00000000-0000-0000-0000-000000000000").said
    assert said["reason"].startswith("the NVIDIA driver has no device GPU-0000")
    assert said["readings"] == []


def test_without_a_driver_there_are_no_readings_and_one_reason(tmp_path: Path) -> None:
    """A laptop without a GPU runs the same program; each field says why it is empty."""
    # An empty file hides the library of a machine that has one.
    (tmp_path / "libnvidia-ml.so.1").touch()
    said = Run(tmp_path, seconds=0).said
    assert said["readings"] == []
    assert said["reason"].startswith("no NVIDIA driver")
    assert set(said["absent"]) == set(said["measured"])
    assert [c["midway"] for c in said["changes"]] == [False]

"""A card's power limit is set, measured at, and always restored; on the scripted driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, build_fake_driver, run
from runs import MadeUp

from nanogauge.power_curves import PowerCurve, PowerPoint, keep_power_curve, load_power_curve
from nanogauge.report.what_if import Scenario, what_if

TOKENS = 1000
SWEEP = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run behind "&"
sys.path.insert(0, "bench")
from power_sweep import sweep
from nanogauge.measure.power_limit import LimitRefused
limits, seconds = json.loads(sys.argv[1])
try:
    points = sweep(0, limits, lambda: time.sleep(0.02), 1000, seconds, 0.1)
    print(json.dumps([point.model_dump() for point in points]))
except LimitRefused as error:
    print(error)
"""
CURVE = PowerCurve(
    device="RTX 4070",
    workload="12 layers x 384",
    measured_unix=1.7e9,
    points=[
        PowerPoint(limit_watts=140, step_seconds=5.0, watts=138, joules_per_token=1e-3),
        PowerPoint(limit_watts=170, step_seconds=4.4, watts=168, joules_per_token=1e-3),
        PowerPoint(limit_watts=200, step_seconds=4.0, watts=190, joules_per_token=1e-3),
    ],
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card that would draw 220 W, has no energy counter, and has a limit of 200 W."""
    folder = build_fake_driver(tmp_path_factory.mktemp("driver"))
    (folder / "script.txt").write_text("0 watts 220\n0 error energy 3\n")
    return folder


def begin(
    driver: Path, file: Path | None, limits: list[float] | None, seconds: float
) -> subprocess.Popen[str]:
    told = {"FAKE_NVML_SCRIPT": str(driver / "script.txt"), "LD_LIBRARY_PATH": str(driver)}
    if file is not None:
        told["FAKE_NVML_LIMITS"] = str(file)
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, json.dumps([limits, seconds])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def set_limits(file: Path) -> list[int]:
    """Every limit that was set, in mW."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def wait_for(file: Path, last: int) -> None:
    until = time.monotonic() + 60
    while set_limits(file)[-1:] != [last]:
        assert time.monotonic() < until, set_limits(file)
        time.sleep(0.05)


def test_each_limit_is_measured_and_the_old_one_restored(driver: Path, tmp_path: Path) -> None:
    """The board draws what it may; joules a token are its watts times the time of one."""
    file = tmp_path / "limits"
    out, err = begin(driver, file, [120, 200, 160], 1.5).communicate(timeout=120)
    points = [PowerPoint.model_validate(point) for point in json.loads(out)]
    assert [point.limit_watts for point in points] == [120, 160, 200], err
    for point in points:
        assert point.watts == pytest.approx(point.limit_watts, rel=0.02)
        assert 0.02 <= point.step_seconds < 0.2
        per_token = point.watts * point.step_seconds / TOKENS
        assert point.joules_per_token == pytest.approx(per_token)
    assert set_limits(file)[1:4] == [200_000, 160_000, 120_000], "the highest first"
    assert set_limits(file)[-1] == 200_000


def test_without_limits_shares_of_the_one_in_force_are_taken(driver: Path, tmp_path: Path) -> None:
    """As far as the card allows them: this one from 100 to 230 W."""
    out, err = begin(driver, tmp_path / "limits", None, 0.1).communicate(timeout=120)
    limits = [point["limit_watts"] for point in json.loads(out)]
    assert limits == pytest.approx([100, 120, 140, 160, 180, 200]), err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_killed_leaves_no_limit_behind(
    driver: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Nobody runs a finally after kill -9: a process that outlives the sweep restores the limit."""
    file = tmp_path / "limits"
    with begin(driver, file, [120, 130], 60.0) as process:
        wait_for(file, 130_000)
        process.send_signal(number)
        process.wait(timeout=60)
        wait_for(file, 200_000)


def test_a_limit_that_may_not_be_set_is_no_crash(driver: Path) -> None:
    out, _ = begin(driver, None, [120, 130], 1.0).communicate(timeout=60)
    assert out == "setting a power limit needs the rights of root (sudo)\n"


def test_a_limit_that_the_card_does_not_have_leaves_the_old_one(
    driver: Path, tmp_path: Path
) -> None:
    file = tmp_path / "limits"
    out, _ = begin(driver, file, [40, 50], 1.0).communicate(timeout=60)
    assert out.startswith("the driver does not set 50 W: ")
    assert set(set_limits(file)) == {200_000}


def test_without_a_gpu_the_sweep_is_skipped_and_says_so() -> None:
    done = run("bench/power_sweep.py", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (0, "skipped: no GPU\n"), done.stderr
    wrong = run("bench/power_sweep.py", "--limits=200", CUDA_VISIBLE_DEVICES="")
    assert wrong.returncode == 2
    assert "--limits takes two or more" in wrong.stderr


def scenario(curve: PowerCurve | None, watts: float = 180.0) -> tuple[Scenario, Scenario]:
    """The same run again, and that at 160 instead of 200 W."""
    made = MadeUp(watts=watts)
    told = what_if(made.config, made.prediction, made.measured(), made.recorded(), curve)
    found = {s.id: s for s in told}
    return found["again"], found["power_limit"]


def test_a_lower_limit_costs_what_was_measured_on_this_card() -> None:
    """At 160 W a third of the way from 170 to 140: 4.6 instead of 4 s, 158 instead of 190 W."""
    again, lowered = scenario(CURVE)
    assert again.total_seconds is not None and lowered.total_seconds is not None
    for end, seconds in (("low", 4.4), ("expected", 4.6), ("high", 5.0)):
        told = getattr(lowered.total_seconds, end) / getattr(again.total_seconds, end)
        assert told == pytest.approx(seconds / 4)
    assert lowered.energy_kwh is not None
    drawn = 180 * 158 / 190
    assert lowered.energy_kwh.expected == pytest.approx(
        drawn * lowered.total_seconds.expected / 3.6e6
    )
    assert "measured on this kind of card (12 layers x 384)" in lowered.why


def test_a_curve_that_does_not_reach_so_low_is_left_out() -> None:
    """Nothing is continued beyond the limits that were measured."""
    short = CURVE.model_copy(update={"points": CURVE.points[1:]})
    assert scenario(short) == scenario(None)


def test_a_kept_curve_is_found_by_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_power_curve("RTX 4070") is None
    path = keep_power_curve(CURVE)
    assert load_power_curve("RTX 4070") == CURVE
    assert load_power_curve("RTX 4070 SUPER") is None
    path.write_text("{")
    assert load_power_curve("RTX 4070") is None

"""train.py from end to end with the sensors of a scripted GPU."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import DEMO, ROOT, TINY, build_fake_driver, command, log_lines, rows_of, steps_of

from nanogauge.doctor.preflight import LOG_BYTES_PER_SECOND, LOG_BYTES_PER_STEP

pytestmark = pytest.mark.alone

SECONDS = 44
"""From the start of the process to the signal that ends it."""
SCRIPT = """
0 watts 150
30 watts 150
40 watts 190 ramp
0 celsius 62
28 celsius 91
24 throttle_bits 0x20
36 throttle_bits 0
30 used_bytes 12700000000
0 error fan 3
0 process 4242 1500000000 graphics
"""


def watts_at(t: float) -> float:
    return 150 + 40 * min(max((t - 30) / 10, 0), 1)


def scripted_joules(begin: float, end: float) -> float:
    steps = 10_000
    width = (end - begin) / steps
    return sum(watts_at(begin + (i + 0.5) * width) for i in range(steps)) * width


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on the CPU that measures a scripted GPU."""
    folder = tmp_path_factory.mktemp("night")
    driver = build_fake_driver(tmp_path_factory.mktemp("driver"))
    script = folder / "script.txt"
    began = time.time()
    script.write_text(f"epoch {began}\n{SCRIPT}")
    flags = ["--train.max-steps=200000", "--train.eval-every=1000", "--measure.gpu=0"]
    flags += ["--cost.price-per-kwh=0.2", "--train.checkpoint-every=200000"]
    with subprocess.Popen(
        command("train.py", DEMO, f"--run.out={folder}", *TINY, *flags),
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_NVML_SCRIPT": str(script)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        time.sleep(began + SECONDS - time.time())
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    (folder / "output.txt").write_text(output)
    (folder / "began.txt").write_text(str(began))
    assert process.returncode == 143, output  # stopped before its last step
    return folder / "demo"


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line["kind"] == kind]


def report_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return result


def instrument(folder: Path, name: str) -> dict[str, Any]:
    (found,) = [i for i in report_of(folder)["instruments"] if i["id"] == name]
    return found  # type: ignore[no-any-return]


def test_the_report_has_the_power_and_energy_of_the_script(night: Path) -> None:
    (start,) = of_kind(night, "start")
    began = float((night.parent / "began.txt").read_text())
    sensors = of_kind(night, "sensor")
    offset = start["unix_time"] - start["elapsed_seconds"] - began
    first, last = sensors[0]["elapsed_seconds"] + offset, sensors[-1]["elapsed_seconds"] + offset
    joules = scripted_joules(first - 1, last)  # a reading is of the second before it
    rows = rows_of(night)
    assert rows["power_watts"]["measured"]["value"] == pytest.approx(joules / (last - first + 1), rel=0.01)
    for row, scripted in (("energy_kwh", joules / 3.6e6), ("cost", 0.2 * joules / 3.6e6)):
        # The run was stopped, so these are not the totals of the whole run.
        assert rows[row]["measured"] is None and "so far" in rows[row]["why"]
        number, unit = rows[row]["why"].split("not measured: ")[1].split()[:2]
        shown = float(number) * (1e-3 if unit == "Wh" else 1)
        assert shown == pytest.approx(scripted, rel=0.01, abs=5e-5 if unit == "Wh" else 0.005)
    for name in ("energy_counter_kwh", "energy_integral_kwh"):
        assert instrument(night, name)["value"] == pytest.approx(joules / 3.6e6, rel=0.01)
    tokens = sum(step["tokens"] for step in steps_of(night))
    assert instrument(night, "joules_per_token")["value"] == pytest.approx(joules / tokens, rel=0.01)


def test_every_step_has_the_power_of_the_samples_in_it(night: Path) -> None:
    """At ten samples a second most steps of some milliseconds have none."""
    steps = steps_of(night)
    with_power = [s for s in steps if "power_watts" in s]
    assert 0 < len(with_power) < len(steps)
    for step in with_power:
        assert 149.9 <= step["power_min_watts"] <= step["power_watts"] <= step["power_max_watts"]
        assert step["power_max_watts"] <= 190.1


def test_the_log_grows_no_faster_than_the_doctor_counts(night: Path) -> None:
    lines = (night / "log.jsonl").read_text().splitlines()
    limits = {"step": LOG_BYTES_PER_STEP, "sensor": LOG_BYTES_PER_SECOND}
    for kind, limit in limits.items():
        sizes = [len(line) for line in lines if line.startswith(f'{{"kind": "{kind}"')]
        assert 0 < sum(sizes) < limit * len(sizes)


def test_throttling_is_reported_with_duration_and_reason(night: Path) -> None:
    throttled = instrument(night, "throttled_seconds")
    assert throttled["value"] == pytest.approx(12, abs=1.6)
    assert "thermal" in throttled["how"]


def test_each_alarm_is_raised_once_in_log_terminal_and_report(night: Path) -> None:
    alarms = [line for line in of_kind(night, "event") if line["level"] == "alarm"]
    kinds = [line["what"] for line in alarms]
    for what in ("temperature", "throttling", "memory"):
        assert kinds.count(what) == 1, kinds
    output = (night.parent / "output.txt").read_text()
    page = (night / "report.html").read_text()
    for line in alarms:
        assert line["text"][:40] in " ".join(output.split())
        assert line["text"] in [alarm["text"] for alarm in report_of(night)["alarms"]]
    assert "throttling" in page


def test_a_field_that_the_driver_does_not_give_is_absent_with_its_reason(night: Path) -> None:
    assert all("fan" not in line for line in of_kind(night, "sensor"))
    fan = instrument(night, "fan")
    assert fan["value"] is None and fan["text"] == "not measured" and "Not Supported" in fan["how"]


def test_idle_power_and_other_programs_are_logged_at_the_start(night: Path) -> None:
    (start,) = of_kind(night, "start")
    assert start["idle_power_watts"] == pytest.approx(150)
    assert start["other_programs"] == {"process 4242": 1500000000}
    idle = instrument(night, "idle_power_watts")
    assert "was not idle" in idle["how"], "the scripted GPU is 97 % busy"


def test_the_ledger_and_the_steps_add_up_to_the_wall_time(night: Path) -> None:
    ledger = report_of(night)["time_ledger"]
    parts = sum(v for k, v in ledger.items() if k != "wall_s" and v is not None)
    assert parts == pytest.approx(ledger["wall_s"], rel=1e-9)
    steps = steps_of(night)
    spans = [s["step_seconds"] for s in steps]
    evaluations = sum(e["seconds"] for e in of_kind(night, "eval"))
    passed = steps[-1]["elapsed_seconds"] - steps[0]["elapsed_seconds"] + spans[0]
    assert sum(spans) + evaluations == pytest.approx(passed, rel=0.005)

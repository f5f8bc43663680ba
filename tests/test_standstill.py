"""A process that stood still, a machine that slept and a clock that jumped are told apart."""

import json
import signal
import time
from pathlib import Path

import pytest
from commands import log_lines, start_run, steps_of, wait_for_step

from nanogauge.measure.standstill import StandstillWatch


class Clocks:
    """The clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.now = self.up = self.cpu = 0.0
        self.wall = 1.8e9
        self.watch = StandstillWatch(lambda: self.now, lambda: self.up, lambda: self.wall, lambda: self.cpu)

    def move(self, now: float, up: float, wall: float, cpu: float = 0.0) -> list[tuple[str, float]]:
        """Move the clocks forward; return name and seconds of what the watch noticed."""
        self.now, self.up, self.wall = self.now + now, self.up + up, self.wall + wall
        self.cpu += cpu
        self.watch.check()
        return [(event.what, event.seconds or 0) for event in self.watch.new()]


@pytest.mark.parametrize(
    ("moved", "noticed"),
    [
        ((0.5, 0.5, 0.5, 0.4), []),
        ((2.9, 2.9, 2.9), []),  # a busy machine
        ((60, 60, 60, 55), []),  # the interpreter was locked, and computed
        ((30.25, 30.25, 30.25, 0.2), [("suspended", 30.0)]),  # SIGSTOP
        ((3600.25, 3600.25, 0.25), [("suspended", 3600.0), ("clock_changed", 0)]),  # paused, set back
        ((0.5, 21600.5, 21600.5), [("slept", 21600.0)]),
        ((0.5, 0.5, 7200.5), [("clock_changed", 0)]),
        ((0.5, 0.5, -3599.5), [("clock_changed", 0)]),
        ((0.5, 0.5, 2.5), []),  # a correction
    ],
)
def test_each_kind_of_standstill_is_named(moved: tuple[float, ...], noticed: list[tuple[str, float]]) -> None:
    clocks = Clocks()
    assert sorted(clocks.move(*moved)) == sorted(noticed)


def test_a_standstill_is_part_of_the_first_duration_that_is_longer() -> None:
    clocks = Clocks()
    clocks.move(10.25, 10.25, 10.25)
    clocks.move(20.25, 20.25, 20.25)
    within = clocks.watch.seconds_within
    assert [within(0.1), within(12.0), within(12.0), within(25.0)] == [0, 10, 0, 20]
    clocks.move(10.25, 10.25, 10.25)  # in none of the next four durations
    assert [within(seconds) for seconds in (1, 1, 1, 1, 500)] == [0] * 5


def test_a_stopped_run_reports_the_time_as_an_entry_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    flags = ["--train.max-steps=60", "--train.eval-every=60", "--train.checkpoint-every=60"]
    with start_run(tmp_path, *flags) as process:
        wait_for_step(folder, 5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 0
    (event,) = [line for line in log_lines(folder) if line.get("what") == "suspended"]
    assert event["text"].startswith("Asleep from ") and 4.5 < event["seconds"] < 6.5
    assert max(step["step_seconds"] for step in steps_of(folder)[1:]) < 4
    report = json.loads((folder / "report.json").read_text())
    ledger = report["time_ledger"]
    assert ledger["asleep_s"] == event["seconds"]
    parts = sum(value for name, value in ledger.items() if name != "wall_s")
    assert parts == pytest.approx(ledger["wall_s"]) and ledger["other_s"] > 0
    assert report["night"]["happenings"][0]["text"] == event["text"]
    total = next(row for row in report["rows"] if row["id"] == "total_seconds")
    assert "asleep" in total["measured"]["how"]

"""The progress of a run: lines at a limited rate."""

import os
import pty
import re
import select
import signal
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from commands import DEMO, ROOT, TINY, command, log_lines
from examples import documented_prediction, documented_spec

from nanogauge.schema import Checkpoint, Eval, Sensor, Step
from trainer.run.progress import ProgressDisplay, clock_times

EVENING = datetime(2026, 7, 1, 20, 10).timestamp()
STEP_SECONDS = 3.91


class Night:
    """The documented run on a display with a simulated clock."""

    def __init__(
        self, first_step: int = 0, before_seconds: float | None = None, log_every: int = 10, **train: int
    ) -> None:
        self.elapsed = 0.0
        self.spec = replace(documented_spec(), **train)
        clocks = {"elapsed_seconds": lambda: self.elapsed, "wall": lambda: EVENING + self.elapsed}
        begun = (self.spec, documented_prediction(), first_step, before_seconds)
        self.screen = ProgressDisplay(*begun, log_every=log_every, **clocks)

    def step(self, number: int, seconds: float = STEP_SECONDS, **more: object) -> None:
        self.elapsed += seconds
        line = {"step": number, "loss": 3.5, "step_seconds": seconds, **more}
        self.screen.step(Step.model_validate(line))


def steps_in(text: str) -> list[int]:
    found = re.findall(r"^step +([\d,]+)/", text, re.MULTILINE)
    return [int(number.replace(",", "")) for number in found]


def test_slow_steps_print_a_line_every_log_every_steps(capsys: pytest.CaptureFixture[str]) -> None:
    night = Night(steps=35, log_every=10)
    for i in range(35):
        night.step(i)
    night.screen.close()
    assert steps_in(capsys.readouterr().out) == [0, 10, 20, 30, 34]


def test_quick_steps_print_a_line_every_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    night = Night(steps=20_000, log_every=1)
    for i in range(1000):
        night.step(i, 0.01)
    assert steps_in(capsys.readouterr().out) == pytest.approx([0, 200, 400, 600, 800], abs=4)
    for last in ([999], []):
        night.screen.close()
        assert steps_in(capsys.readouterr().out) == last


def test_a_plain_line_shows_only_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    night = Night(log_every=1)
    night.step(0, loss=None)
    line = capsys.readouterr().out
    assert "loss not finite" in line and not re.search(r" W |°C|GiB|kWh", line)
    night.step(1, peak_host_bytes=2**29)
    assert "  0.50 GiB at most  " in capsys.readouterr().out
    night = Night()
    memory = {"process_used_bytes": int(9.8 * 2**30), "device_used_bytes": int(10.4 * 2**30)}
    sensor = Sensor(power_watts=198.4, temperature_celsius=71.0, energy_joules=4.68e6, **memory)
    night.screen.sensor(sensor)
    night.step(0)
    line = capsys.readouterr().out
    assert line.startswith(
        "step       0/20,000  loss 3.5000  3.91 s a step  134,089 tokens/s  40.2 TFLOP/s  "
        "MFU 69.0 %  198 W  process 9.8 GiB  card 10.4 of 12.0 GiB  71 °C  1.3 kWh  "
    )
    clock = r"(... )?\d\d:\d\d"
    finish = rf"finish {clock}, predicted {clock} \({clock} to {clock}\)"
    assert re.search(f"  2\\d\\.\\d h left, {finish}\n$", line)


def test_clock_times_name_the_day_where_it_changes() -> None:
    evening = datetime(2026, 7, 1, 20, 10).astimezone()  # a Wednesday
    hour = 3600.0
    assert clock_times(evening, hour, 11 * hour, 12 * hour) == ["21:10", "Thu 07:10", "08:10"]
    assert clock_times(evening, 11 * hour, -hour) == ["Thu 07:10", "Wed 19:10"]
    assert clock_times(evening, 170 * hour, 1e12) == ["2026-07-08 22:10", "in more than 100 years"]


def test_the_finish_is_shown_beside_the_predicted_one(capsys: pytest.CaptureFixture[str]) -> None:
    night = Night()
    total = documented_prediction().quantities["total_seconds"]
    now = datetime.fromtimestamp(EVENING).astimezone()
    expected, low, high = clock_times(now, total.expected, total.low, total.high)
    night.screen.plan()
    assert f"{expected} ({low} to {high})" in capsys.readouterr().out
    night.elapsed = 3 * 3600.0  # something took three hours before the first step
    night.step(0)
    (finish,) = clock_times(now, night.elapsed + night.screen.seconds_left(0, STEP_SECONDS))
    line = capsys.readouterr().out
    assert f"finish {finish}, predicted {expected.split()[-1]} (" in line


def test_time_left_counts_evaluations_and_checkpoints_to_come() -> None:
    night = Night(steps=12, eval_every=5, checkpoint_every=4)
    night.screen.evaluated(Eval(step=0, seconds=100.0))
    night.screen.checkpointed(Checkpoint(step=4, seconds=1000.0))
    left = [night.screen.seconds_left(step, 1.0) for step in (0, 3, 4, 7, 9, 11)]
    assert left == [3311, 3308, 2307, 2204, 1202, 1100]


def test_the_projection_of_a_resumed_run_includes_its_earlier_time() -> None:
    whole, resumed = Night(), Night(first_step=5000, before_seconds=5000 * STEP_SECONDS)
    unknown = Night(first_step=5000)
    for night, first in ((whole, 0), (resumed, 5000), (unknown, 5000)):
        assert night.screen.projected_total_seconds(first, 0.0) is None
        for i in range(first, first + 40):
            night.step(i)
    total = whole.screen.projected_total_seconds(39, whole.elapsed)
    again = resumed.screen.projected_total_seconds(5039, resumed.elapsed)
    assert total is not None and again is not None
    # Evaluations and checkpoints that were made before are in the time before: here there are none.
    assert total - again == pytest.approx(5000 / 20_000 * (total - 20_000 * STEP_SECONDS), rel=0.1)
    assert total == pytest.approx(20_000 * STEP_SECONDS, rel=0.02)
    assert unknown.screen.projected_total_seconds(5039, 1.0) is None
    assert unknown.screen.go_or_no_go(5039, 1.0).startswith("At 3.91 s a step: finish")
    assert resumed.screen.go_or_no_go(5039, resumed.elapsed).startswith("Go: at 3.91 s a step")


def test_the_verdict_is_printed_once_after_30_steady_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, verdict in ((STEP_SECONDS, "Go: at 3.91 s"), (20.0, "No-go: at 20 s")):
        night = Night()
        for i in range(31):
            assert " a step the run takes" not in capsys.readouterr().out
            night.step(i, seconds)
        assert verdict in capsys.readouterr().out


@pytest.mark.alone
def test_a_step_that_is_not_shown_costs_less_than_50_microseconds() -> None:
    night = Night(log_every=10)
    lines = [Step(step=i, loss=3.5, step_seconds=3.9 + i % 7) for i in range(20_000)]
    began = time.process_time()
    for line in lines:
        night.screen.step(line)
        night.screen.projected_total_seconds(line.step, 1.0)
    spent = time.process_time() - began
    night.screen.close()
    assert spent < len(lines) * 50e-6


class Terminal:
    """A run of the tiny demo in a pseudo-terminal."""

    def __init__(self, folder: Path, *more: str) -> None:
        arguments = command("train.py", DEMO, f"--run.out={folder}", *TINY, *more)
        self.text = ""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" has it ignored
            os.chdir(ROOT)
            os.execv(arguments[0], arguments)

    def read(self, until: str | None = None, seconds: float = 120) -> str:
        """Read the output up to a text or to its end."""
        deadline = time.monotonic() + seconds
        while until is None or until not in self.text:
            ready, _, _ = select.select([self.descriptor], [], [], deadline - time.monotonic())
            assert ready, f"nothing more came after {self.text[-500:]!r}"
            try:
                self.text += os.read(self.descriptor, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        return self.text

    def close(self) -> int:
        """Wait for the end and return the exit status."""
        self.read()
        _, status = os.waitpid(self.pid, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("more", [[], ["--supervise"]])
def test_ctrl_c_in_a_terminal_ends_with_a_checkpoint(tmp_path: Path, more: list[str]) -> None:
    """Under --supervise the run receives it once: twice would lose the checkpoint."""
    terminal = Terminal(tmp_path, "--train.max-steps=20000", *more)
    terminal.read(until="step       0/")
    os.write(terminal.descriptor, b"\x03")
    assert terminal.close() == 130
    assert log_lines(tmp_path / "demo")[-1]["reason"] == "SIGINT was received"

"""SIGINT, SIGTERM and SIGHUP at each stage of a run: time until its end, status, kept files."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from commands import DEMO, TINY, command, log_lines, start_run, steps_of, wait_for_step, wait_until

from trainer.run.signals import SAME_REQUEST_SECONDS, StopSignal, hangup_warning


def log_of(folder: Path) -> str:
    path = folder / "log.jsonl"
    return path.read_text() if path.exists() else ""


def test_a_stop_before_the_first_line_leaves_nothing_behind(tmp_path: Path) -> None:
    """The process does not handle the signal yet and dies of it."""
    with start_run(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    assert not (tmp_path / "demo" / "log.jsonl").exists()


@pytest.mark.parametrize(("stage", "number"), [("compilation", signal.SIGTERM), ("evaluation", signal.SIGINT)])
def test_a_stop_does_not_wait_for_a_compilation_or_an_evaluation(
    tmp_path: Path, stage: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This evaluation would take an hour, and the compilation has an empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = tmp_path / "demo"
    compiling = ["--run.compile=true", "--model.n-layer=4"]
    flags = {"compilation": compiling, "evaluation": ["--train.eval-batches=1000000"]}[stage]
    with start_run(tmp_path, *flags) as process:
        assert wait_until(lambda: '"data_order"' in log_of(folder))  # compilation follows
        time.sleep(0.3)
        asked = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert time.monotonic() - asked < 20
    lines = log_lines(folder)
    assert lines[-1]["status"] == "stopped"
    assert lines[-1]["reason"] == f"{number.name} was received"
    assert lines[-1]["steps"] == (0 if stage == "compilation" else 1)
    assert {line["kind"] for line in lines}.isdisjoint({"compile", "eval"})
    assert (folder / "report.html").exists()


def test_a_second_ctrl_c_ends_the_run_within_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    flags = ["--train.grad-accum=1000000", "--train.eval-every=100000", "--data.order=random"]
    with start_run(tmp_path, *flags) as process:
        assert wait_until(lambda: '"eval"' in log_of(folder))
        process.send_signal(signal.SIGINT)
        time.sleep(SAME_REQUEST_SECONDS + 0.1)
        assert process.poll() is None  # within its step
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert log_lines(folder)[-1]["kind"] != "end"


def test_two_sigterms_in_a_row_count_as_one(tmp_path: Path) -> None:
    """A service manager signals the supervisor and the run, and the supervisor forwards it."""
    folder = tmp_path / "demo"
    with start_run(tmp_path, "--train.checkpoint-every=10000", "--rehearse=15000") as process:
        wait_for_step(folder, 3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert (folder / "checkpoints" / f"step_{len(steps_of(folder)):08d}").is_dir()


@pytest.mark.parametrize("how", ["kill", "closed terminal", "nohup"])
def test_a_hangup_stops_a_run_with_a_checkpoint_and_a_report(tmp_path: Path, how: str) -> None:
    """A closed terminal takes no more output."""
    folder = tmp_path / "demo"
    flags = [f"--run.out={tmp_path}", *TINY, "--train.max-steps=20000", "--train.eval-every=20000"]
    given = command("train.py", DEMO, *flags, "--train.checkpoint-every=20000")
    if how == "nohup":
        given = ["nohup", *given]
    controller, terminal = os.openpty()
    with subprocess.Popen(given, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        reader = threading.Thread(target=read_until_closed, args=(controller,), daemon=True)
        reader.start()
        wait_for_step(folder, 3)
        if how == "closed terminal":
            os.close(controller)
        process.send_signal(signal.SIGHUP)
        if how == "nohup":
            time.sleep(1.2 * SAME_REQUEST_SECONDS)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        number = signal.SIGTERM if how == "nohup" else signal.SIGHUP
        assert process.wait(60) == 128 + number
    end = log_lines(folder)[-1]
    assert (end["status"], end["reason"]) == ("stopped", f"{number.name} was received")
    assert (folder / "checkpoints" / f"step_{end['steps']:08d}").is_dir()
    assert (folder / "report.html").exists()


def test_a_second_hangup_is_no_impatience() -> None:
    """The kernel sends one, and the shell another."""
    stop = StopSignal()
    stop.let_steps_end()
    stop._on_signal(signal.SIGHUP, None)
    stop._received_seconds -= 10 * SAME_REQUEST_SECONDS
    stop._on_signal(signal.SIGHUP, None)
    assert (stop.repeated, stop.exit_status) == (False, 129)


def read_until_closed(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({}, False),
        ({"SSH_CONNECTION": "a 1 b 22"}, True),
        ({"SSH_CONNECTION": "a 1 b 22", "TMUX": "/tmp/t"}, False),
        ({"SSH_CONNECTION": "a 1 b 22", "STY": "1.pts"}, False),
    ],
)
def test_a_run_over_ssh_says_how_to_outlive_the_connection(
    variables: dict[str, str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, terminal = os.openpty()
    with open(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert (hangup_warning(variables) is not None) == warned
    os.close(controller)

"""Ctrl-C and SIGTERM at every stage of a run: how soon it ends, with which status, what is kept."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from commands import log_lines, start_run, steps_of, wait_for_step, wait_until


def began(folder: Path) -> bool:
    """Whether the run is past its start: what comes now is compilation, or an evaluation."""
    path = folder / "log.jsonl"
    return path.exists() and '"data_order"' in path.read_text()


def test_a_stop_before_the_first_line_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nobody listens yet: the signal ends the process by itself, as it does any other."""
    with start_run(tmp_path) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    assert not (tmp_path / "demo" / "log.jsonl").exists()


@pytest.mark.parametrize("stage", ["compilation", "evaluation"])
def test_a_stop_does_not_wait_for_a_compilation_or_an_evaluation(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each can take minutes, after which a service manager would have killed the run.

    This evaluation would take an hour, and the compilation finds nothing ready from before.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = tmp_path / "demo"
    compiling = ["--run.compile=true", "--model.n-layer=4"]
    flags = {"compilation": compiling, "evaluation": ["--train.eval-batches=1000000"]}[stage]
    with start_run(tmp_path, *flags) as process:
        assert wait_until(lambda: began(folder))
        time.sleep(1)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert time.monotonic() - asked < 20
    lines = log_lines(folder)
    assert lines[-1]["status"] == "stopped"
    assert lines[-1]["reason"] == "SIGTERM was received"
    assert lines[-1]["steps"] == (0 if stage == "compilation" else 1)
    assert {line["kind"] for line in lines}.isdisjoint({"compile", "eval"})
    assert (folder / "report.html").exists()


def test_a_second_ctrl_c_ends_a_step_that_would_take_for_ever(tmp_path: Path) -> None:
    """What was written stays, and the next --resume goes on from the checkpoint before."""
    folder = tmp_path / "demo"
    flags = ["--train.grad-accum=1000000", "--train.eval-every=100000", "--data.order=random"]
    with start_run(tmp_path, *flags) as process:
        assert wait_until(lambda: '"eval"' in log_of(folder))
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None  # in its step
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert log_lines(folder)[-1]["kind"] != "end"


def log_of(folder: Path) -> str:
    path = folder / "log.jsonl"
    return path.read_text() if path.exists() else ""


def test_the_same_request_sent_twice_is_one(tmp_path: Path) -> None:
    """A service manager sends SIGTERM to the supervisor and to the run, which gets it again from
    the supervisor: that must not cost the checkpoint. A rehearsal, too, then ends with 143: with 0
    only where it got as far as it was asked to.
    """
    folder = tmp_path / "demo"
    with start_run(tmp_path, "--train.checkpoint-every=10000", "--rehearse=15000") as process:
        wait_for_step(folder, 3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert (folder / "checkpoints" / f"step_{len(steps_of(folder)):08d}").is_dir()

"""train.py --supervise: what is restarted, and after which backoff."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import DEMO, ROOT, TINY, command, log_lines, run, steps_of, train_tiny, wait_for_step
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.config import load_config
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Start
from trainer.run.resources import open_run_folder
from trainer.run.supervisor import VARIABLE, LogState, Supervisor, wait_seconds

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


class Watched:
    """A Supervisor of `python -c` that notes its waits and messages."""

    def __init__(self, code: str, seen: Sequence[LogState], max_restarts: int = 10) -> None:
        self.waits: list[float] = []
        self.said: list[str] = []
        looks = iter(seen)
        self.status = Supervisor(
            [sys.executable, "-c", code],
            lambda: next(looks, None),
            max_restarts,
            self.said.append,
            self.waits.append,
        ).run()


@pytest.mark.parametrize("status", [0, 2, 129, 130, 143])
def test_intended_ends_are_not_restarted(status: int) -> None:
    """Finished, bad input and stopped."""
    watched = Watched(f"import sys; sys.exit({status})", [])
    assert (watched.status, watched.waits, watched.said) == (status, [], [])


def test_a_refusal_after_an_accepted_start_is_retried() -> None:
    """Another program may hold GPU memory for a minute."""
    code = f"import os, sys; sys.exit(1 if os.environ['{VARIABLE}'] == '0' else 2)"
    watched = Watched(code, [LogState(), *[LogState(starts=1, steps=3)] * 9], max_restarts=3)
    assert (watched.status, watched.waits) == (2, [5, 10, 20])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_run_killed_by_a_stop_signal_is_not_restarted(name: str) -> None:
    """Before its first step a run does not handle signals."""
    number = getattr(signal, name)
    code = f"import os, signal; signal.signal({number:d}, signal.SIG_DFL); os.kill(os.getpid(), "
    watched = Watched(code + f"{number:d})", [])
    assert (watched.status, watched.waits) == (128 + number, [])


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [("import sys; sys.exit(1)", 1, "exit status 1"), (KILLED, 137, "SIGKILL")],
)
def test_crashes_without_progress_are_retried_up_to_the_limit(
    code: str, status: int, message: str
) -> None:
    watched = Watched(code, [], max_restarts=3)
    assert watched.status == status
    assert watched.waits == [5, 10, 20]
    assert len(watched.said) == 4
    assert all(message in text for text in watched.said)
    assert "restart 3 follows in 20 s" in watched.said[2]
    assert "given up after 3 restarts without a new step" in watched.said[3]


def test_a_new_step_resets_the_backoff() -> None:
    seen = [
        LogState(),
        *(LogState(starts=i, steps=s) for i, s in enumerate((9, 9, 7, 12, 12), start=1)),
    ]
    watched = Watched("import sys; sys.exit(1)", seen, max_restarts=2)
    # Step 7 after step 9 is no progress: those steps were made before.
    assert watched.waits == [5, 10]
    watched = Watched("import sys; sys.exit(1)", [seen[0], seen[1], seen[2], *seen[4:]], 2)
    assert watched.waits == [5, 10, 5, 10]


@given(st.integers(1, 10_000))
def test_the_backoff_grows_up_to_five_minutes(attempt: int) -> None:
    assert 5 <= wait_seconds(attempt) <= wait_seconds(attempt + 1) <= 300


def test_a_restart_resumes_only_a_run_that_it_has_started(tmp_path: Path) -> None:
    """A crash at the start must not resume another run in the folder."""
    log = tmp_path / "starts.txt"
    code = (
        "import os, sys; open(sys.argv[1], 'a').write(f'{os.environ[\"NANOGAUGE_RESTART\"]} "
        "{sys.argv[2:]}\\n'); sys.exit(1)"
    )
    looks = iter([LogState(starts=4), LogState(starts=4), LogState(starts=5), LogState(starts=6)])
    supervisor = Supervisor(
        [sys.executable, "-c", code, str(log)],
        lambda: next(looks),
        2,
        lambda _: None,
        lambda _: None,
    )
    assert supervisor.run() == 1
    resume = "['--resume', 'auto']"
    assert log.read_text().splitlines() == ["0 []", "1 []", f"2 {resume}"]


def test_a_log_that_cannot_be_read_counts_as_no_progress() -> None:
    watched = Watched(KILLED, [LogState(), LogState(starts=1, steps=5)], max_restarts=2)
    assert watched.waits == [5, 10]


def supervised(out: Path, *more: object) -> subprocess.Popen[str]:
    flags = [f"--run.out={out}", *TINY, "--supervise", *more]
    return subprocess.Popen(
        command("train.py", DEMO, *flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child_of(folder: Path) -> int:
    pid = json.loads((folder / ".lock").read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_killed_run_is_restarted_and_finishes(tmp_path: Path) -> None:
    """It is killed before its first checkpoint."""
    folder = tmp_path / "demo"
    flags = ["--train.max-steps=300", "--train.eval-every=300", "--train.checkpoint-every=10000"]
    with supervised(tmp_path, *flags) as process:
        wait_for_step(folder, 6)
        if sys.platform == "linux":
            assert resident_bytes(process.pid) < 30e6
        os.kill(child_of(folder), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (line,) = errors.splitlines()
    assert line.startswith("supervise: the run died of SIGKILL")
    assert line.endswith("restart 1 follows in 5 s.")
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert [start["restart"] for start in starts] == [0, 1]
    assert [line["step"] for line in steps_of(folder)][-300:] == list(range(300))
    assert json.loads((folder / "report.json").read_text())["run"]["status"] == "finished"


def test_a_supervised_run_is_stopped_through_its_supervisor(tmp_path: Path) -> None:
    """The supervisor forwards the signal once and returns the exit status of the run."""
    folder = tmp_path / "demo"
    with supervised(tmp_path, "--train.max-steps=20000") as process:
        wait_for_step(folder, 3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors == ""
    end = log_lines(folder)[-1]
    assert end["reason"] == "SIGTERM was received"
    assert (folder / "checkpoints" / f"step_{end['steps']:08d}").is_dir()


def test_a_diverged_run_is_not_restarted(tmp_path: Path) -> None:
    flags = ["--optimizer.learning-rate=1e30", "--optimizer.warmup-steps=0", "--run.seed=1"]
    began = time.monotonic()
    done = train_tiny(tmp_path, *flags, "--supervise", "--max-restarts=3")
    assert done.returncode == 1
    assert "its log says that it would only fail again" in done.stderr
    lines = log_lines(tmp_path / "demo")
    assert [line["kind"] for line in lines].count("start") == 1
    assert lines[-1]["restartable"] is False
    assert time.monotonic() - began < 60


def test_a_run_that_died_before_its_first_log_line_can_be_resumed(tmp_path: Path) -> None:
    config = load_config(DEMO, {"run": {"out": str(tmp_path)}})
    config.folder.mkdir()
    (config.folder / "log.jsonl").write_bytes(b'{"kind": "sta')
    opened = open_run_folder(config, torch.device("cpu"), "float32", resume=True, force=False)
    folder = opened.folder
    assert (opened.earlier_seconds, opened.checkpoint) == (None, None)
    assert (folder.path / "prediction.json").exists()
    log = RunLog(folder.path)
    log.write(Start(max_steps=1, prediction_sha256=folder.prediction_sha256, device="cpu"))
    assert len(log_lines(folder.path)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-restarts=2"], "--max-restarts is for --supervise; give both."),
        (["--supervise", "--max-restarts=-1"], "--max-restarts takes a number from 0 on."),
        (["--supervise", "--trian.max-steps=3"], "did you mean --train.max-steps?"),
    ],
)
def test_wrong_flags_are_refused_once(flags: list[str], message: str) -> None:
    done = run("train.py", DEMO, *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

"""train.py --supervise: what is restarted, and after which backoff."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import DEMO, ROOT, TINY, command, log_lines, run, steps_of, train_tiny, wait_for_step

from nanogauge.config import load_config
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Start
from trainer.run.resources import open_run_folder
from trainer.run.supervisor import VARIABLE, LogState, Supervisor

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


class Watched:
    """A Supervisor of `python -c` that notes its waits and messages."""

    def __init__(self, code: str, seen: Sequence[LogState], max_restarts: int = 10) -> None:
        self.waits: list[float] = []
        self.said: list[str] = []
        looks = iter(seen)
        self.status = Supervisor(
            [sys.executable, "-c", code], lambda: next(looks, None), max_restarts, self.said.append, self.waits.append
        ).run()


def test_a_refusal_after_an_accepted_start_is_retried() -> None:
    """Another program may hold GPU memory for a minute."""
    code = f"import os, sys; sys.exit(1 if os.environ['{VARIABLE}'] == '0' else 2)"
    watched = Watched(code, [LogState(), *[LogState(starts=1, steps=3)] * 9], max_restarts=3)
    assert (watched.status, watched.waits) == (2, [5, 10, 20])


@pytest.mark.parametrize("status", [0, 2, 129, 130, 143])
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_finished_or_was_refused_or_stopped_is_not_restarted(status: int, killed: bool) -> None:
    """Before its first step a run does not handle signals and dies of them."""
    code = f"import sys; sys.exit({status})"
    if killed and status > 128:
        number = status - 128
        code = f"import os, signal; signal.signal({number}, signal.SIG_DFL); "
        code += f"os.kill(os.getpid(), {number})"
    watched = Watched(code, [])
    assert (watched.status, watched.waits) == (status, [])
    assert killed or watched.said == []


def test_crashes_without_progress_are_retried_up_to_the_limit() -> None:
    exits = ("import sys; sys.exit(1)", 1, "exit status 1")
    for code, status, message in (exits, (KILLED, 137, "SIGKILL")):
        watched = Watched(code, [], max_restarts=3)
        assert (watched.status, watched.waits) == (status, [5, 10, 20])
        assert len(watched.said) == 4
        assert all(message in text for text in watched.said)
        assert "restart 3 follows in 20 s" in watched.said[2]
        assert "given up after 3 restarts without a new step" in watched.said[3]


def test_a_new_step_resets_the_backoff() -> None:
    seen = [LogState(starts=i, steps=s) for i, s in enumerate((0, 9, 9, 7, 12, 12))]
    watched = Watched("import sys; sys.exit(1)", seen, max_restarts=2)
    # Step 7 after step 9 is no progress: those steps were made before.
    assert watched.waits == [5, 10]
    watched = Watched("import sys; sys.exit(1)", [seen[0], seen[1], seen[2], *seen[4:]], 2)
    assert watched.waits == [5, 10, 5, 10]
    unreadable = Watched(KILLED, seen[:2], max_restarts=2)
    assert unreadable.waits == [5, 10]
    long = Watched(KILLED, [], max_restarts=12)
    assert long.waits == [5, 10, 20, 40, 80, 160, *[300] * 6]


def test_a_restart_resumes_only_a_run_that_it_has_started(tmp_path: Path) -> None:
    """A crash at the start must not resume another run in the folder."""
    log = tmp_path / "starts.txt"
    code = (
        "import os, sys; open(sys.argv[1], 'a').write(f'{os.environ[\"NANOGAUGE_RESTART\"]} "
        "{sys.argv[2:]}\\n'); sys.exit(1)"
    )
    looks = iter([LogState(starts=4), LogState(starts=4), LogState(starts=5), LogState(starts=6)])
    command = [sys.executable, "-c", code, str(log)]
    nothing: list[object] = []
    supervisor = Supervisor(command, lambda: next(looks), 2, nothing.append, nothing.append)
    assert supervisor.run() == 1
    resume = "['--resume', 'auto']"
    assert log.read_text().splitlines() == ["0 []", "1 []", f"2 {resume}"]


def supervised(out: Path, *more: object) -> subprocess.Popen[str]:
    flags = [f"--run.out={out}", *TINY, "--supervise", *more]
    pipe = subprocess.PIPE
    started, one_thread = command("train.py", DEMO, *flags), {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(started, cwd=ROOT, env=one_thread, stdout=pipe, stderr=pipe, text=True)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_killed_run_is_restarted_and_finishes(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    flags = ["--train.max-steps=150", "--train.eval-every=150", "--train.checkpoint-every=10000"]
    with supervised(tmp_path, *flags) as process:
        wait_for_step(folder, 6)
        if sys.platform == "linux":
            assert resident_bytes(process.pid) < 30e6
        os.kill(json.loads((folder / ".lock").read_text())["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (line,) = errors.splitlines()
    assert line.startswith("supervise: the run died of SIGKILL")
    assert line.endswith("restart 1 follows in 5 s.")
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert [start["restart"] for start in starts] == [0, 1]
    assert [line["step"] for line in steps_of(folder)][-150:] == list(range(150))
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
    done = train_tiny(tmp_path, *flags, "--supervise", "--max-restarts=3")
    assert done.returncode == 1
    failure, supervisor = done.stderr.strip().splitlines()
    assert "whose updates were skipped, and there is no checkpoint to roll back to" in failure
    assert "its log says that it would only fail again" in supervisor
    lines = log_lines(tmp_path / "demo")
    assert [line["kind"] for line in lines].count("start") == 1
    assert (lines[-1]["status"], lines[-1]["restartable"]) == ("failed", False)
    assert (tmp_path / "demo" / "report.html").exists()


def test_a_run_that_died_before_its_first_log_line_can_be_resumed(tmp_path: Path) -> None:
    config = load_config(DEMO, {"run": {"out": str(tmp_path)}})
    config.folder.mkdir()
    (config.folder / "log.jsonl").write_bytes(b'{"kind": "sta')
    opened = open_run_folder(config, torch.device("cpu"), "float32", resume=True)
    folder = opened.folder
    assert (opened.earlier_seconds, opened.checkpoint) == (None, None)
    assert (folder.path / "prediction.json").exists()
    log = RunLog(folder.path)
    log.write(Start(max_steps=1, prediction_sha256=folder.prediction_sha256, device="cpu"))
    assert len(log_lines(folder.path)) == 1


def test_wrong_flags_are_refused_once() -> None:
    for flags, message in (
        (["--max-restarts=2"], "--max-restarts is for --supervise; give both."),
        (["--supervise", "--max-restarts=-1"], "--max-restarts takes a number from 0 on."),
        (["--supervise", "--trian.max-steps=3"], "did you mean --train.max-steps 3"),
    ):
        done = run("train.py", DEMO, *flags)
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.count("\n") == 1

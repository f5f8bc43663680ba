"""The watchdog ends a loop that hangs, and no other."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from commands import ROOT, command, log_lines, wait_until

from nanogauge.runlog.reader import read_log


def begin(folder: Path, limit: float, step: float, hang_at: int) -> subprocess.Popen[str]:
    arguments = command("tests/hanging.py", folder, limit, step, hang_at)
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_hang_ends_the_run_and_hang_txt_has_its_stack(tmp_path: Path) -> None:
    with begin(tmp_path, limit=2, step=0.01, hang_at=1) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    written = (tmp_path / "hang.txt").read_text()
    for text in (written, errors):
        assert "no sign of life for 2 s" in text
        assert "in forward_that_never_returns" in text
        assert text.count("Traceback") == 0
    last = log_lines(tmp_path)[-1]
    assert (last["kind"], last["what"], last["level"]) == ("event", "hang", "alarm")
    assert not read_log(tmp_path).truncated


HANGS_TWICE = """
import sys, threading
from pathlib import Path
from trainer.run import watchdog
watchdog.DUMP_SECONDS = 0.5
watchdog.Watchdog(Path(sys.argv[1]), 0.5, lambda text: threading.Event().wait()).start()
threading.Event().wait()
"""


def test_a_hang_ends_the_run_even_if_the_log_hangs(tmp_path: Path) -> None:
    """Both hang if the disk does."""
    hanging = [sys.executable, "-c", HANGS_TWICE, str(tmp_path)]
    done = subprocess.run(hanging, cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1


def test_announced_slow_steps_and_a_suspended_process_are_no_hang(tmp_path: Path) -> None:
    """Compilation and evaluations announce their length; Ctrl-Z or a sleeping laptop suspends."""
    with begin(tmp_path, limit=1, step=0.4, hang_at=-1) as process:
        log = tmp_path / "log.jsonl"
        assert wait_until(lambda: log.exists() and '"step": 4' in log.read_text())
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert len(read_log(tmp_path).steps) == 8
    assert not (tmp_path / "hang.txt").exists()

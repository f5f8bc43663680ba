"""The report of a running job, rewritten by a background process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import DEMO, TINY, Copy, wait_until
from runs import make_finished, make_folder, steps, write

from nanogauge.analysis.report_model import build_report
from nanogauge.report.background import BackgroundReport
from nanogauge.report.html import render_html

LONG = [f"--train.{name}=20000" for name in ("max-steps", "eval-every", "checkpoint-every")]
REFRESH = '<meta http-equiv="refresh" content="60">'


@contextmanager
def training(out: Path) -> Iterator[tuple[Copy, int]]:
    """Train with a short rewrite interval; yield the process and the id of its child."""
    process = Copy("faulty_train.py", ["rewrite:0.3", str(DEMO), f"--run.out={out}", *TINY, *LONG], out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        assert wait_until((out / "demo" / "report.html").exists)
        (background,) = [
            int(child)
            for child in children.read_text().split()
            if b"nanogauge.report.background" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        yield process, background
    finally:
        process.kill()
        process.wait()


def test_the_page_is_rewritten_during_the_run_and_final_at_its_end(tmp_path: Path) -> None:
    page = tmp_path / "demo" / "report.html"
    with training(tmp_path) as (process, child):
        first = page.read_text()
        assert REFRESH in first
        assert "Running" in first
        assert wait_until(lambda: page.read_text() != first)
        assert os.getpriority(os.PRIO_PROCESS, child) == 19
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert not Path(f"/proc/{child}").exists()
        text = page.read_text()
        assert REFRESH not in text
        assert "Stopped" in text


def test_a_killed_run_gets_a_last_page_and_the_background_process_exits(tmp_path: Path) -> None:
    page = tmp_path / "demo" / "report.html"
    with training(tmp_path) as (process, child):
        process.kill()
        process.wait()
        assert wait_until(lambda: REFRESH not in page.read_text())
        assert "Died" in page.read_text()
        assert wait_until(lambda: not Path(f"/proc/{child}").exists())


def test_the_death_of_the_background_process_does_not_affect_its_parent(tmp_path: Path) -> None:
    make_finished(tmp_path)
    background = BackgroundReport.start(tmp_path, 0.1)
    assert wait_until((tmp_path / "report.html").exists)
    process = background._process
    assert process is not None
    process.kill()
    process.wait()
    background.stop()


def test_only_the_page_of_a_running_job_refreshes(tmp_path: Path) -> None:
    make_finished(tmp_path / "finished")
    make_folder(tmp_path / "running")
    write(tmp_path / "running", steps(0, 30))
    for name in ("finished", "running"):
        page = render_html(*build_report(tmp_path / name, None))
        assert (REFRESH in page) == (name == "running")

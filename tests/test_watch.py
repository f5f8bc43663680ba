"""`nanogauge watch`: an unchanged program is run, measured and compared with its prediction."""

import contextlib
import json
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import build_fake_driver, log_lines, rows_of, steps_of, wait_until

from nanogauge.analysis.report_model import build_report
from nanogauge.importers.formats import TEXT_FORMATS
from nanogauge.importers.live import LiveConverter
from nanogauge.importers.parsed import split_runs
from nanogauge.importers.reader import LogParser
from nanogauge.schema import Compile, Eval, LogLine, Start, Step

SCRIPT = """
import sys, time
print("Overriding: device = cpu")
for name, value in {"compile": False, "block_size": 64, "batch_size": 8, "gradient_accumulation_steps": 1, "n_layer": 2,
                    "n_head": 2, "n_embd": 64, "max_iters": 12, "eval_interval": 6, "eval_iters": 2}.items():
    print(f"Overriding: {name} = {value}")
print("found vocab_size = 65 (inside data/mine/meta.pkl)")
began = time.time()
for i in range(13):
    if i % 6 == 0:
        time.sleep(0.4)
        print(f"step {i}: train loss {4 - i / 10:.4f}, val loss {4.1 - i / 10:.4f}")
    time.sleep(0.1)
    now = time.time()
    print(f"iter {i}: loss {4 - i / 10:.4f}, time {(now - began) * 1000:.2f}ms, mfu -100.00%")
    began = now
"""
"""Prints as nanoGPT does, and leaves its output in the buffer."""
CLAIMS = """
document = { title = "An answer" }
claim = [
    { key = "step_seconds", unit = "ms", low = 10, high = 20, quote = "10 to 20 ms a step" },
    { key = "tokens_per_step", unit = "tokens", value = 512, quote = "512 tokens a step" },
]
"""


def watch(out: Path, code: str, *options: str) -> list[str]:
    """Return the command that watches a program of this Python code."""
    command = [sys.executable, "-m", "nanogauge", "watch", "--out", str(out), *options, "--"]
    return [*command, sys.executable, "-c", code]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, check=False)


def run_info(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())["run"]


def test_steps_are_timed_as_printed_and_judged(tmp_path: Path) -> None:
    out, claims = tmp_path / "run", tmp_path / "claims.toml"
    claims.write_text(CLAIMS)
    done = run(watch(out, SCRIPT, "--claims", str(claims)))
    assert done.returncode == 0, done.stderr
    printed = [float(line.split(b"time ")[1].split(b"ms")[0]) / 1000 for line in re.findall(b"iter .*", done.stdout)]
    rows, steps = rows_of(out), steps_of(out)
    steady = statistics.median(seconds for i, seconds in enumerate(printed) if i % 6)
    assert rows["step_seconds"]["measured"]["value"] == pytest.approx(steady, rel=1e-3)
    assert rows["step_seconds"]["analytic"] is not None
    assert rows["step_seconds"]["verdict"] == "missed" and rows["tokens_per_step"]["verdict"] == "held"
    assert rows["power_watts"]["why"] == "not measured: no GPU"
    evaluations = [line for line in log_lines(out) if line["kind"] == "eval"]
    assert [e["val_loss"] for e in evaluations] == [4.1, 3.5, 2.9]
    assert all(0.35 < e["seconds"] < 0.8 for e in evaluations)
    assert 0.09 < steps[0]["step_seconds"] < 0.4 < steps[0]["printed_seconds"]
    assert [s["loss"] for s in steps] == [round(4 - i / 10, 4) for i in range(13)]
    assert run_info(out)["status"] == "finished"
    assert run_info(out)["prediction_made"].endswith("after the start, from what was printed by then")


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_output_and_exit_status_are_those_of_the_plain_run(tmp_path: Path, ending: str, status: int) -> None:
    code = r"""
import os, sys
os.write(1, b"a\r\n\xff half a line")
os.write(2, b"an error\n")
os.write(1, b" and\rthe rest" + bytes(range(256)) * 500)
"""
    plain, done = run([sys.executable, "-c", code + ending]), run(watch(tmp_path / "run", code + ending))
    assert (done.returncode, done.stdout) == (status, plain.stdout)
    assert done.stderr.startswith(plain.stderr)
    assert (tmp_path / "run" / "output.log").read_bytes().replace(plain.stderr, b"") == plain.stdout
    assert log_lines(tmp_path / "run")[-1]["reason"] == f"exit status {status}"
    assert run_info(tmp_path / "run")["status"] == "failed"


def test_an_unknown_program_has_its_time_power_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build_fake_driver(tmp_path)))
    child = "import time; x = bytearray(200_000_000); print('epoch 1: accuracy 0.5'); time.sleep(2.5)"
    out, code = tmp_path / "run", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run(watch(out, code)).stdout == b"epoch 1: accuracy 0.5\n"
    rows = rows_of(out)
    assert 2.5 < rows["total_seconds"]["measured"]["value"] < 10
    assert rows["power_watts"]["measured"]["value"] == pytest.approx(100, rel=0.01)
    assert rows["step_seconds"]["measured"] is None
    report = (out / "report.md").read_text()
    assert "its steps and its losses were not seen" in report and "Finished after 0 steps" in report
    memory = re.search(r"Memory of the process on the host, peak.*?([\d.]+) GB", report)
    assert memory is not None and 0.2 < float(memory[1]) < 0.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_program_once(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import signal, sys, time
got = []
signal.signal({number:d}, lambda *_: got.append(1))
print("ready")
while not got: time.sleep(0.05)
time.sleep(0.5)
sys.exit(40 + len(got))
"""
    with subprocess.Popen(watch(tmp_path, code), stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline() == b"ready\n"
        running.send_signal(number)
    assert running.returncode == 41


def test_a_terminal_is_passed_on_and_its_interrupt_comes_once(tmp_path: Path) -> None:
    code = """
import sys, time
print("ready", sys.stdout.isatty())
try: time.sleep(60)
except KeyboardInterrupt: time.sleep(0.5)
sys.exit(7)
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, watch(tmp_path, code))
    said = b""
    with contextlib.suppress(OSError):  # the terminal is closed at the end
        while piece := os.read(terminal, 4096):
            said += piece
            if said.endswith(b"ready True\r\n"):
                os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert said.startswith(b"ready True\r\n^C")


def test_a_killed_watch_leaves_the_steps_so_far(tmp_path: Path) -> None:
    with subprocess.Popen(watch(tmp_path, SCRIPT), stdout=subprocess.PIPE) as running:
        assert wait_until(lambda: (tmp_path / "log.jsonl").exists() and len(steps_of(tmp_path)) > 3, 30)
        running.kill()
    report, *_ = build_report(tmp_path, None)
    assert (report.run.state, report.run.max_steps) == ("died", 12)
    assert report.run.steps_done > 3


def printed(first: int, last: int, timed: bool) -> Iterator[tuple[float, str]]:
    """Yield the lines of steps of 2 s and evaluations of 9 s, and the seconds before each; compiling takes 20 s."""
    for i in range(first, last + 1):
        if i % 10 == 0:
            yield 9.0, f"step {i}: train loss 4.0000, val loss 4.1000"
        own = 22.0 if i == first else 2.0
        yield own, f"iter {i}: loss 3.0000" + f", time {1000 * (own + 9 * (i % 10 == 0)):.2f}ms" * timed


def converted(lines: Iterable[tuple[float, str]], compiled: bool = True) -> list[LogLine]:
    elapsed, found = 0.0, list[LogLine]()
    parser = LogParser(TEXT_FORMATS["nanogpt"], lambda: elapsed)
    start = Start(source="watch", max_steps=20, prediction_sha256="", device="CPU")
    converter = LiveConverter(parser.format, start, compiled)
    for number, (seconds, line) in enumerate(lines, start=1):
        elapsed += seconds
        parser.read(number, line)
        if runs := split_runs(parser.log.processes):
            found += converter.lines(runs[0], ended=False)
    parser.finish([])
    return [*found, *converter.lines(split_runs(parser.log.processes)[0], ended=True)]


@pytest.mark.parametrize("timed", [True, False])
def test_compilation_and_evaluations_are_separated_from_the_steps(timed: bool) -> None:
    lines = converted(printed(0, 20, timed))
    steps = {line.step: line.step_seconds for line in lines if isinstance(line, Step)}
    assert steps == pytest.approx({i: 2.0 if i % 10 else None for i in range(21)})
    assert [line.seconds for line in lines if isinstance(line, Compile)] == pytest.approx([20.0])
    evaluated = [line.seconds for line in lines if isinstance(line, Eval)]
    assert evaluated == pytest.approx([9.0 if timed else None, 9.0, 9.0])
    eager = [line for line in converted(printed(0, 20, timed), compiled=False) if isinstance(line, Step | Compile)]
    assert isinstance(eager[0], Step) and eager[0].step_seconds == pytest.approx(22.0)


def test_a_process_that_resumes_the_run_continues_its_log() -> None:
    lines = converted([*printed(0, 15, True), (5.0, "Resuming training from out"), *printed(10, 20, True)])
    (start,) = [line for line in lines if isinstance(line, Start)]
    assert (start.first_step, start.continues) == (10, True)
    after = lines[lines.index(start) :]
    assert [line.step for line in after if isinstance(line, Step)] == [*range(10, 21)]


def test_bad_calls_are_refused_before_the_program_starts(tmp_path: Path) -> None:
    for given, meant in (
        (["--out", str(tmp_path)], b"put the program after two dashes"),
        (["--out", str(tmp_path), "--", "no-such-program"], b"cannot run no-such-program: No such file"),
        (["--claims", "none.toml", "--", "true"], b"none.toml"),
        (["--out", str(tmp_path), "--cost.grams-co2-per-kwh=-5", "--", "true"], b"grams_co2_per_kwh: input should be"),
        (["--out", str(tmp_path), "--gpu=RTX 9999", "--", "true"], b"no GPU is named 'RTX 9999'"),
    ):
        done = run([sys.executable, "-m", "nanogauge", "watch", *given])
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, b"", 1)
        assert meant in done.stderr

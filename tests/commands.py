"""Run the project's commands as a user does, and a configuration small enough for every test."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nanogauge.cli import run_command

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.toml"
# Processes that start in another folder import trainer and model, which are not installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
TINY = [
    "--model.n-layer=1",
    "--model.n-head=2",
    "--model.n-embd=32",
    "--model.block-size=32",
    "--model.dropout=0.1",
    "--train.micro-batch=4",
    "--train.grad-accum=2",
    "--train.max-steps=12",
    "--train.eval-every=5",
    "--train.eval-batches=2",
    "--train.checkpoint-every=4",
    "--train.log-every=1",
    "--run.compile=false",
]


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


IN_A_COPY = ("train.py", "report.py", "plan.py", "export.py", "evaluate.py", "sample.py")
"""commands that behave in a copy of train_server.py's process as in one of their own"""
READ_AT_START = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
_AT_START = {name: os.environ.get(name) for name in READ_AT_START}


def run(
    script: str, *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project to its end; its output as text."""
    as_at_start = all(os.environ.get(name) == value for name, value in _AT_START.items())
    read_first = "--supervise" in arguments  # before anything is imported
    if script in IN_A_COPY and as_at_start and not environment and not read_first:
        with tempfile.TemporaryDirectory() as folder:
            return run_in_copy(script, list(map(str, arguments)), Path(folder, "run"))
    return subprocess.run(
        command(script, *arguments),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_here(
    script: str, *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """What `run` gives, without a process: for refusals, each of which is over in milliseconds."""
    main = importlib.import_module(Path(script).stem).main
    return run_main(main, script, *arguments, folder=folder)


def run_main(
    main: Callable[[Sequence[str]], int], script: str, *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a main function in this process as the command of that name."""
    out, err = io.StringIO(), io.StringIO()
    given = [script, *map(str, arguments)]
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", given),
        pytest.raises(SystemExit) as left,
    ):
        run_command(main)
    code = left.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def train_tiny(out: Path, *more: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train the tiny model in out/demo, in a process of its own."""
    arguments = [str(a) for a in (DEMO, f"--run.out={out}", *TINY, *more)]
    if environment or "--supervise" in arguments:  # which are looked at before all is imported
        return run("train.py", *arguments, **environment)
    return run_in_copy("train.py", arguments, out)


def run_in_copy(script: str, arguments: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy of train_server.py's process, its output in files beside `out`."""
    files = [out.with_name(f"{out.name}.{kind}") for kind in ("stdout", "stderr")]
    for file in files:
        file.unlink(missing_ok=True)
    server = _train_server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {
        "script": script,
        "arguments": arguments,
        "stdout": str(files[0]),
        "stderr": str(files[1]),
        "environment": dict(os.environ),
    }
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files))


@functools.cache
def _train_server() -> subprocess.Popen[str]:
    """The process of train_server.py, which ends when this one closes its input."""
    return subprocess.Popen(
        command("tests/train_server.py"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_run(out: Path, *more: object) -> subprocess.Popen[bytes]:
    """Begin a tiny run that would take minutes."""
    arguments = ["train.py", DEMO, f"--run.out={out}", *TINY, "--train.max-steps=20000", *more]
    return subprocess.Popen(
        command(*map(str, arguments)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_step(folder: Path, step: int, process: int = 1) -> None:
    """Until the first, second ... process of a run has logged this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").exists():
            sessions = (folder / "log.jsonl").read_text().split('"kind": "start"')
            if len(sessions) > process and f'"step": {step},' in sessions[process]:
                return
        time.sleep(0.002)  # steps take some 10 ms
    raise AssertionError(f"step {step} was not reached")


def wait_until(true: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line["kind"] == "step"]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of report.json; the last where several share an id."""
    report = json.loads((folder / "report.json").read_text())
    return {row["id"]: row for row in report["rows"]}


def build_fake_driver(folder: Path) -> Path:
    """The scripted NVML of fake_nvml.c in a folder; LD_LIBRARY_PATH makes it the driver's."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the stand-in for the driver cannot be built")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-Wl,-soname,libnvidia-ml.so.1",
        "-o",
        str(folder / "libnvidia-ml.so.1"),
    ]
    subprocess.run([*command, str(Path(__file__).with_name("fake_nvml.c")), "-lm"], check=True)
    return folder

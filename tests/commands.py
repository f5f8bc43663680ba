"""Run the project's commands as a user does, and a small configuration for all tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    *("--model.n-layer=1", "--model.n-head=2", "--model.n-embd=32", "--model.block-size=32"),
    *("--model.dropout=0.1", "--train.micro-batch=4", "--train.grad-accum=2"),
    *("--train.max-steps=12", "--train.eval-every=5", "--train.eval-batches=2"),
    *("--train.checkpoint-every=4", "--train.log-every=1", "--run.compile=false"),
]


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


IN_A_COPY = ("train.py", "report.py", "plan.py", "export.py", "evaluate.py", "sample.py")
"""commands that behave in a copy of train_server.py's process as in a new process"""
READ_AT_START = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
READ_AT_START += ("OMP_NUM_THREADS", "CXX", "HF_HOME", "HF_ENDPOINT", "PYTHONIOENCODING")
_AT_START = {name: os.environ.get(name) for name in READ_AT_START}


def can_be_copied(script: str, arguments: Sequence[object], environment: Mapping[str, str]) -> bool:
    """Return False for what is read before a script's imports: variables and --supervise."""
    as_at_start = all(os.environ.get(name) == value for name, value in _AT_START.items())
    late = as_at_start and not environment.keys() & _AT_START.keys()
    return script in IN_A_COPY and late and "--supervise" not in arguments


def run(script: str, *arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project to its end, with one thread as in a copy; its output as text."""
    if can_be_copied(script, arguments, environment):
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(script, list(map(str, arguments)), Path(folder, "run"), environment)
            return copy.result()
    return subprocess.run(
        command(script, *arguments),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Return a finished process, which must have exit status 0."""
    assert done.returncode == 0, done.stderr
    return done


def run_here(script: str, *arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Return what `run` does, from this process: for refusals, which take milliseconds."""
    main = importlib.import_module(Path(script).stem).main
    return run_main(main, script, *arguments, folder=folder)


def run_main(
    main: Callable[[Sequence[str]], int], script: str, *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a main function in this process as the command `script`."""
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
    """Train the tiny model in out/demo."""
    return run("train.py", DEMO, f"--run.out={out}", *TINY, *more, **environment)


def start_run(out: Path, *more: object) -> Copy:
    """Start a tiny run of 20,000 steps in out/demo."""
    arguments = [DEMO, f"--run.out={out}", *TINY, "--train.max-steps=20000", *more]
    return Copy("train.py", list(map(str, arguments)), out)


def run_in_copy(script: str, arguments: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the tests, or of the project, in a copy with its output beside `out`."""
    return Copy(script, arguments, out).result()


_STORES: list[Any] = []
"""keeps the stores that torchrun's agent would host"""


def start_ranks(ranks: int, arguments: Sequence[str], out: Path, script: str = "train.py") -> list[Copy]:
    """Start the processes that torchrun would start, each as a copy."""
    from torch.distributed import TCPStore

    _STORES.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    world = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_STORES[-1].port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    copies = []
    for rank in map(str, range(ranks)):
        environment = world | {"RANK": rank, "LOCAL_RANK": rank}
        file = out.with_name(f"{out.name}.rank{rank}")
        copies.append(Copy(script, list(arguments), file, environment))
    return copies


def train_ranks(
    ranks: int, arguments: Sequence[str], out: Path, script: str = "train.py"
) -> subprocess.CompletedProcess[str]:
    """Run start_ranks to the end; the first exit status that is not 0, and all output."""
    done = [copy.result() for copy in start_ranks(ranks, arguments, out, script)]
    status = next((each.returncode for each in done if each.returncode), 0)
    said, errors = ("".join(getattr(d, name) for d in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(list(arguments), status, said, errors)


class Copy:
    """A command in a copy of train_server.py's process, with its output in files beside `out`.

    Used like subprocess.Popen.
    """

    def __init__(
        self, script: str, arguments: list[str], out: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._arguments = arguments
        self._files = [out.with_name(f"{out.name}.{kind}") for kind in ("stdout", "stderr")]
        for file in self._files:
            file.unlink(missing_ok=True)
        request = {
            "script": script,
            "arguments": arguments,
            "stdout": str(self._files[0]),
            "stderr": str(self._files[1]),
            "environment": {**os.environ, **(environment or {})},
        }
        self.pid: int = _ask_server(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask_server({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        assert wait_until(lambda: self.poll() is not None, timeout), "the command has not ended"
        assert self.returncode is not None
        return self.returncode

    def result(self) -> subprocess.CompletedProcess[str]:
        try:
            self.wait()
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        texts = (file.read_text() for file in self._files)
        return subprocess.CompletedProcess(self._arguments, self.returncode, *texts)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.wait()


def _ask_server(request: Mapping[str, object]) -> Any:
    server = _train_server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _train_server() -> subprocess.Popen[str]:
    """Start train_server.py, which ends when its input is closed."""
    server = subprocess.Popen(
        command("tests/train_server.py"),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def wait_for_step(folder: Path, step: int, process: int = 1) -> None:
    """Wait until the first, second ... process of a run has logged this step."""
    log = folder / "log.jsonl"

    def reached() -> bool:
        sessions = log.read_text().split('"kind": "start"') if log.exists() else []
        return len(sessions) > process and f'"step": {step},' in sessions[process]

    assert wait_until(reached), f"step {step} was not reached"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system that can be filled, or skip the test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(path: Path) -> None:
    """Write zeros to a file until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def wait_until(true: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)  # steps take some 10 ms
    return True


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line["kind"] == "step"]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of report.json by id; the last of several with the same id."""
    report = json.loads((folder / "report.json").read_text())
    return {row["id"]: row for row in report["rows"]}


def build_fake_driver(folder: Path) -> Path:
    """Compile fake_nvml.c in a folder; LD_LIBRARY_PATH=folder makes it the driver's NVML."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    name = "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
    subprocess.run([*command, str(Path(__file__).with_name("fake_nvml.c")), "-lm"], check=True)
    return folder

"""Run commands in forked copies of a process that has imported them.

The imports take most of a tiny run. A request is a line of JSON on standard input. A request with the name of a script,
its arguments, its environment and its output files starts a copy; the answer is the process id. The request {"poll":
PID} is answered with the exit status,
or null while the copy runs. This process only imports torch and never uses it, so that a copy starts like a new
process.
"""

import atexit
import functools
import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: E402  before torch

# isort: split
import torch._dynamo  # noqa: E402, F401  imported by the optimizer

import report  # noqa: E402, F401
import train  # noqa: E402, F401
import trainer.calibrate  # noqa: E402
from nanogauge.cli import run_command  # noqa: E402
from nanogauge.report.html import templates  # noqa: E402


def warm_up() -> None:
    """Compile templates once, and measure the processor briefly in each copy."""
    trainer.calibrate.SECONDS_EACH, trainer.calibrate.MATMUL_SIZES = 0.02, (512,)
    trainer.calibrate.COPY_BYTES = 2**24
    for environment in (templates(), templates(plain=True)):
        for name in environment.list_templates():
            environment.get_template(name)


def train_in_copy(request: dict[str, Any], work: Callable[[], object]) -> int:
    """Fork a process that runs `work` with the request's arguments; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["environment"])
        sys.argv = [request.get("script", "train.py"), *request["arguments"]]
        leave(work)
    return child


def leave(work: Callable[[], object]) -> NoReturn:
    """Do the work and exit without freeing Python's objects, which takes a second with torch."""
    status = 1
    try:
        work()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    # A copy may wait for a thread that only the process it was forked from has.
    deadline = threading.Timer(60, os._exit, (status,))
    deadline.daemon = True
    deadline.start()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_script(script: str) -> None:
    run_command(importlib.import_module(Path(script).stem).main)


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if "script" in request:
            os.environ.clear()  # a variable that the test has removed is not there either
            answer = train_in_copy(request, functools.partial(run_script, request["script"]))
        else:
            child, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if child else None
        print(json.dumps(answer), flush=True)

"""Runs commands in copies of a process that has imported them, which takes most of a tiny run.

Reads a request a line from its standard input, as JSON: the script, its arguments, and files for
standard output and standard error. Answers each with a line that holds the exit status. Nothing of
torch is used in this process, only imported, so that a copy begins as a fresh process would.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: E402, F401  before torch

# isort: split
import torch._dynamo  # noqa: E402, F401  which the optimizer imports

import report  # noqa: E402, F401
import train  # noqa: E402, F401
from nanogauge.cli import run_command  # noqa: E402


def train_in_copy(request: dict[str, Any], work: Callable[[], object]) -> int:
    """Begin a copy of this process that does this with the request's arguments; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["environment"])
        sys.argv = [request.get("script", "train.py"), *request["arguments"]]
        work()
        raise AssertionError("the command of a copy ends it")
    return child


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.clear()  # a variable that the test has removed is not there either
        module = Path(request["script"]).stem
        child = train_in_copy(
            request, lambda name=module: run_command(importlib.import_module(name).main)
        )
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

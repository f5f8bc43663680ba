"""train.py starts anew as itself, with an allocator that keeps what a step frees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainer.step.torch_env import ALLOCATOR

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")),
    reason="GNU's allocator is not here",
)
KEEP = "from trainer.step.torch_env import keep_pages; keep_pages()"


def run(code: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Of a fresh process: its number, and what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != ALLOCATOR}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=variables | environment
    ) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return process.pid, printed


def test_it_is_the_same_process_with_the_same_arguments_and_starts_anew_once() -> None:
    """Who waits for it by its number, or gave it a name with spaces, sees no other program."""
    code = f"import os, sys; print('started', flush=True); {KEEP}; print(os.getpid(), sys.argv[1:])"
    process, printed = run(code, "--run.name=a b", "-x")
    expected = ["started", "started", f"{process} {['--run.name=a b', '-x']}"]
    assert printed.splitlines() == expected


def test_settings_of_the_user_stand() -> None:
    """Somebody who tunes the allocator keeps what they chose, and the process is not begun anew."""
    code = f"import os; print('started'); {KEEP}; print(os.environ['{ALLOCATOR}'])"
    chosen = "glibc.malloc.arena_max=2"
    assert run(code, **{ALLOCATOR: chosen})[1].splitlines() == ["started", chosen]


def test_memory_that_was_freed_comes_back_without_the_kernel() -> None:
    """By default GNU's allocator hands the memory of a step back, and each page is made anew."""
    count = """
import resource
import numpy
def fill():
    return [numpy.ones(2_000_000) for _ in range(4)]
fill()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""
    kept, by_default = int(run(KEEP + count)[1]), int(run(count)[1])
    assert kept < 0.05 * by_default

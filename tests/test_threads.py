"""train.py re-executes itself with malloc settings that keep the memory of a step."""

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
    variables = {name: value for name, value in os.environ.items() if name != ALLOCATOR}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables | environment) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return process.pid, printed


def test_the_process_re_executes_once_with_the_same_id_and_arguments() -> None:
    code = f"import os, sys; print('started', flush=True); {KEEP}; print(os.getpid(), sys.argv[1:])"
    process, printed = run(code, "--run.name=a b", "-x")
    expected = ["started", "started", f"{process} {['--run.name=a b', '-x']}"]
    assert printed.splitlines() == expected


def test_malloc_settings_of_the_user_are_kept_without_a_restart() -> None:
    code = f"import os; print('started'); {KEEP}; print(os.environ['{ALLOCATOR}'])"
    chosen = "glibc.malloc.arena_max=2"
    assert run(code, **{ALLOCATOR: chosen})[1].splitlines() == ["started", chosen]


def test_freed_memory_is_reused_without_page_faults() -> None:
    """By default glibc returns the memory of a step to the kernel."""
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

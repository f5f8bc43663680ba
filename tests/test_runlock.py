"""The lock of a run folder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import log_lines, start_run, train_tiny, wait_for_step

from nanogauge.errors import BadInput
from nanogauge.runlog.lock import acquire_lock, is_locked, refuse_locked

LOCKS = """
import subprocess, sys, time
from pathlib import Path
from nanogauge.runlog.lock import acquire_lock
lock = acquire_lock(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def frozen_files(folder: Path) -> dict[str, str]:
    names = ("spec.json", "config.toml", "machine.json", "prediction.json", ".lock")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_a_second_run_in_a_folder_is_refused_and_changes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert is_locked(folder) is None
    with start_run(tmp_path) as process:
        wait_for_step(folder, 2)
        assert is_locked(folder) is True
        before = frozen_files(folder)
        second = train_tiny(tmp_path, "--train.max-steps=20000", "--resume=auto")
        assert second.returncode == 2
        assert f"process {process.pid}, since 20" in second.stderr
        assert second.stderr.count("\n") == 1
        assert process.poll() is None
        assert frozen_files(folder) == before
        process.kill()
    assert is_locked(folder) is False
    acquire_lock(folder).close()
    steps = [line["step"] for line in log_lines(folder) if line["kind"] == "step"]
    assert steps == list(range(len(steps)))


def test_a_lock_ends_with_its_process_although_a_child_lives_on(tmp_path: Path) -> None:
    """The W&B mirror may outlive a killed run, which must still be resumable."""
    with subprocess.Popen([sys.executable, "-c", LOCKS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(BadInput, match=f"process {process.pid}, since"):
            refuse_locked(tmp_path)
        process.kill()
        process.wait()
        try:
            assert is_locked(tmp_path) is False
            acquire_lock(tmp_path).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_readers_never_block_a_run(tmp_path: Path) -> None:
    """A reader takes a shared lock for an instant."""
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            is_locked(tmp_path)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(20):
            lock = acquire_lock(tmp_path)
            assert is_locked(tmp_path) is True
            lock.close()
    finally:
        done.set()
        for reader in readers:
            reader.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = acquire_lock(tmp_path)
    assert lock.warning is not None and "no locks" in lock.warning
    assert is_locked(tmp_path) is None
    lock.close()


def test_the_lock_of_a_folder_from_another_machine_is_unknown(tmp_path: Path) -> None:
    acquire_lock(tmp_path).close()
    assert is_locked(tmp_path) is False
    written = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps({**written, "host": "elsewhere"}))
    assert is_locked(tmp_path) is None


def test_a_lock_that_is_released_soon_is_waited_for(tmp_path: Path) -> None:
    lock = acquire_lock(tmp_path)
    threading.Timer(0.2, lock.close).start()
    began = time.monotonic()
    with contextlib.closing(acquire_lock(tmp_path)):
        assert time.monotonic() - began < 1

"""A log on a full disk: the run continues, and no line is lost or torn."""

import contextlib
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import fill_disk, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.runlog import writer
from nanogauge.runlog.reader import LOG_NAME, read_log
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import End, Event, Start, Step

FIRST = Start(max_steps=10, prediction_sha256="ab" * 32, device="RTX 4070")


@contextlib.contextmanager
def room_until(size: int) -> Iterator[None]:
    """Limit the size of files: the write at the limit is cut short and the next one refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def as_written(line: Start | Step | Event | End) -> bytes:
    values = {"kind": line.kind, **line.model_dump(mode="json", exclude_none=True)}
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=25),
    rooms=st.lists(st.integers(0, 2500), min_size=25, max_size=25),
)
def test_the_file_is_always_a_prefix_of_complete_lines(lengths: list[int], rooms: list[int]) -> None:
    """Before every line the disk is full, has room for half a line, or has room again."""
    with tempfile.TemporaryDirectory() as name:
        path, written = Path(name) / LOG_NAME, b""
        with RunLog(Path(name)) as log:
            for length, room in zip(lengths, rooms, strict=False):
                line = Event(what="note", text="字" * length)
                written += as_written(line)
                with room_until(room):
                    log.write(line)
                data = path.read_bytes()
                assert written.startswith(data)
                assert data == b"" or data.endswith(b"\n")
                assert (log.problem is None) == (data == written)
        assert path.read_bytes() == written


def test_closing_a_log_that_lacks_lines_raises(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(FIRST)
    with (
        pytest.raises(OSError, match="2 lines of the log could not be written"),
        room_until((tmp_path / LOG_NAME).stat().st_size),
        log,
    ):
        log.write(Step(step=0, loss=4.0))
        log.write(End(status="finished", steps=1))
    assert (tmp_path / LOG_NAME).read_bytes() == as_written(FIRST)


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_PENDING_BYTES", 4000)
    with RunLog(tmp_path) as log:
        log.write(FIRST)
        with room_until((tmp_path / LOG_NAME).stat().st_size), pytest.raises(OSError, match="large"):
            for step in range(200):
                log.write(Step(step=step, loss=4.0))
        log.write(End(status="failed", steps=step))
    assert [s.step for s in read_log(tmp_path).steps] == [*range(step)]


def test_nothing_is_lost_on_a_disk_that_another_file_fills(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk, RunLog(disk) as log:
        log.write(FIRST)
        filler = disk / "filler"
        fill_disk(filler)
        problems = set()
        for step in range(400):  # 20 KB: the log's own page is full soon
            log.write(Step(step=step, loss=4.0))
            problems.add(log.problem)
        (sentence,) = problems - {None}
        assert sentence is not None and os.strerror(28) in sentence and "free space" in sentence
        read = read_log(disk)
        assert 0 < len(read.steps) < 400 and not read.truncated
        filler.unlink()
        log.write(Step(step=400, loss=4.0))
        assert log.problem is None
        assert [step.step for step in read_log(disk).steps] == list(range(401))

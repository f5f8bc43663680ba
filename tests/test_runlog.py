"""The run log: every written line is read, and a crash costs at most the last one."""

import json
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from nanogauge.runlog.reader import LOG_NAME, LogReader, lines_of, read_log
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import End, Eval, Event, LogLine, Start, Step, Stored

KINDS: tuple[type[Stored], ...] = typing.get_args(typing.get_args(LogLine)[0])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Draw any value of a field's type; numbers are finite."""
    if typing.get_origin(annotation) is Literal:
        return st.sampled_from(typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return values_of(typing.get_args(annotation)[0])
    if annotation is int:
        return st.integers(0, 2**53)
    if typing.get_origin(annotation) in (list, dict):
        return st.from_type(annotation)
    if choices := typing.get_args(annotation):
        return st.one_of(*(values_of(choice) for choice in choices))
    return FLOATS if annotation is float else st.from_type(annotation)


@st.composite
def lines_of_kind(draw: st.DrawFn, kind: type[Stored]) -> Any:
    """Draw a line of a kind with any values."""
    values = {key: draw(values_of(f.annotation)) for key, f in kind.model_fields.items()}
    return kind(**(values | {"source": "nanogpt_log"} if kind is Start else values))


ANY_LINE = st.one_of(*(lines_of_kind(kind) for kind in KINDS))
FIRST = Start(max_steps=10, prediction_sha256="ab" * 32, device="RTX 4070")


def write(folder: Path, lines: list[Any]) -> Path:
    with RunLog(folder) as log:
        for line in lines:
            log.write(line)
    return folder / LOG_NAME


def files_lines(path: Path) -> list[Any]:
    return list(lines_of(path.read_bytes(), path))


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_LINE, max_size=4))
def test_every_kind_of_line_reads_back_equal(lines: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name), lines)
        assert files_lines(path) == lines
        raw = path.read_bytes().split(b"\n")[:-1]
        assert len(raw) == len(lines)
        for piece, line in zip(raw, lines, strict=True):
            pairs = json.loads(piece, object_pairs_hook=list)
            assert pairs[0] == ("kind", line.kind)
            assert None not in dict(pairs).values()


SMALL_LOG = [
    FIRST,
    Step(step=0, loss=10.8, step_seconds=4.0),
    Event(what="sample", text="ein Satz über 大語言模型"),
    Step(step=1, loss=10.1, step_seconds=3.9),
]


def test_a_log_cut_at_any_byte_reads_as_its_complete_lines(tmp_path: Path) -> None:
    """A log without a complete line is refused, and a resumed run drops the same incomplete one."""
    path = write(tmp_path, SMALL_LOG)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        if whole == 0:
            with pytest.raises(BadInput):
                read_log(tmp_path)
            continue
        read = read_log(tmp_path)
        found = [*read.starts, *list(read.steps)[:1], *read.events, *list(read.steps)[1:]]
        assert found == SMALL_LOG[:whole], size
        assert read.truncated == (data[size - 1 : size] != b"\n")
        write(tmp_path, [SMALL_LOG[-1]])
        assert files_lines(path) == [*SMALL_LOG[:whole], SMALL_LOG[-1]]


def test_a_folder_or_file_that_is_no_run_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run folder"):
        read_log(tmp_path)
    write(tmp_path, SMALL_LOG[1:])
    with pytest.raises(BadInput, match="does not begin with a start line"):
        read_log(tmp_path)


def test_lines_get_the_time_of_the_clock_unless_they_have_one(tmp_path: Path) -> None:
    ticks = iter([0.5, 2.5])
    with RunLog(tmp_path, lambda: next(ticks)) as log:
        log.write(FIRST)
        log.write(Step(step=0, elapsed_seconds=1.25))
        log.write(End(status="finished", steps=1))
    read = read_log(tmp_path)
    assert read.starts[0].elapsed_seconds == 0.5
    assert read.steps[0].elapsed_seconds == 1.25
    assert read.session_seconds == [2.5]


def test_reading_a_growing_log_equals_reading_it_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, [*SMALL_LOG, FIRST.model_copy(update={"first_step": 1})])
    data = path.read_bytes()
    reader = LogReader(tmp_path)
    for size in range(data.index(b"\n") + 1, len(data) + 1):
        path.write_bytes(data[:size])
        assert reader.read() == read_log(tmp_path), size
    assert len(reader.read().steps) == 1  # a process resumed at step 1
    path.write_bytes(data.replace(b"10.8", b"10.9").replace(b'_sha256": "', b'_sha256": "0', 1))
    assert reader.read() == read_log(tmp_path)
    path.write_bytes(data[: data.index(b"\n") + 1])
    assert reader.read() == read_log(tmp_path)


@settings(max_examples=30, deadline=None)
@given(died_at=st.integers(1, 12), saved_every=st.integers(1, 5), cut=st.booleans())
def test_a_resumed_run_replaces_the_steps_it_repeats(died_at: int, saved_every: int, cut: bool) -> None:
    """The time of both processes counts."""
    resumed_at = died_at // saved_every * saved_every

    def process(first: int, last: int, loss: float) -> list[Any]:
        start = FIRST.model_copy(update={"first_step": first, "elapsed_seconds": 0.0})
        lines: list[Any] = [start]
        for step in range(first, last):
            if step % saved_every == 0:
                lines.append(Eval(step=step, val_loss=loss, elapsed_seconds=float(step - first)))
            lines.append(Step(step=step, loss=loss, elapsed_seconds=float(step - first + 1)))
        return lines

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder, process(0, died_at, loss=1.0))
        if cut:  # the run died while it wrote the line of one more step
            path.write_bytes(path.read_bytes() + b'{"kind": "step", "st')
        write(folder, process(resumed_at, 14, loss=2.0))
        read = read_log(folder)
    assert [s.step for s in read.steps] == list(range(14))
    assert [s.loss for s in read.steps] == [1.0] * resumed_at + [2.0] * (14 - resumed_at)
    assert sorted(e.step for e in read.evals) == list(range(0, 14, saved_every))
    assert all(e.val_loss == (2.0 if e.step >= resumed_at else 1.0) for e in read.evals)
    assert read.session_seconds == [float(died_at), float(14 - resumed_at)]
    assert not read.truncated


def test_a_non_finite_number_is_never_written(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="JSON"):
        log.write(Step(step=0, loss=float("nan")))
    assert (tmp_path / LOG_NAME).read_bytes() == b""


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "\udcff",
        "null",
        '{"kind": "stpe"}',
        '{"kind": []}',
        "[]",
        '{"kind": "step"}',
        '{"kind": "step", "step": true}',
        '{"kind": "step", "step": 1.0}',
        '{"kind": "step", "step": 9007199254740993}',
        '{"kind": "step", "step": 1, "loss": NaN}',
        '{"kind": "step", "step": 1, "loss": 1e999}',
        '{"kind": "step", "step": 1, "elapsed_seconds": "a"}',
        '{"kind": "sensor", "throttle": 3}',
        "[" * 100_000,
    ],
)
def test_the_first_damaged_line_of_a_block_is_named(tmp_path: Path, damaged: str) -> None:
    start = '{"kind": "start", "max_steps": 9, "prediction_sha256": "x", "device": "d"}'
    step, reading = '{"kind": "step", "step": %d}', '{"kind": "sensor", "power_watts": 1}'
    lines = [start, step % 0, reading, step % 1, damaged, reading, step % 2]
    lines += ['{"kind": "sensor", "power_watts": "b"}', '{"kind": "step"}']
    text = "\n".join(lines) + "\n"
    (tmp_path / LOG_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=r"line 5 of .* is damaged"):
        read_log(tmp_path)

"""Measurements of runs that stopped, died and resumed."""

from typing import Any

import pytest
from examples import documented_prediction, documented_spec

from nanogauge.analysis.measured import Measurements, measure
from nanogauge.analysis.verdicts import build_rows
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Checkpoint, Compile, End, Eval, LogLine, Start, Step


def start(first_step: int, **more: Any) -> Start:
    line = Start(max_steps=20_000, first_step=first_step, prediction_sha256="", device="RTX 4070")
    return line.model_copy(update={"elapsed_seconds": 1.0, **more})


def steps(begin: int, end: int, **more: Any) -> list[LogLine]:
    return [
        Step(
            elapsed_seconds=2.0 + 4.0 * (step - begin), step=step, loss=5.0, step_seconds=3.9, data_wait_seconds=0.01
        ).model_copy(update=more)
        for step in range(begin, end)
    ]


def read(*lines: LogLine) -> RunHistory:
    recorded = RunHistory()
    for line in lines:
        recorded.add(line)
    return recorded


def measured(*lines: LogLine) -> Measurements:
    return measure(read(*lines), documented_spec(), documented_prediction())


def test_a_run_that_died_after_a_rehearsal_is_unfinished() -> None:
    rehearsed = End(elapsed_seconds=20.0, status="stopped", steps=4, wall_seconds=20.0)
    found = measured(start(0), *steps(0, 4), rehearsed, start(4), *steps(4, 10))
    assert found.status == "unfinished"
    assert found.steps_done == 10
    assert found.ledger.wall_s == pytest.approx(20.0 + 22.0)


def test_a_run_that_was_killed_once_and_then_finished_is_finished() -> None:
    end = End(elapsed_seconds=50.0, status="finished", steps=20_000, wall_seconds=50.0)
    evaluation = Eval(elapsed_seconds=9.0, step=0, train_loss=10.8, val_loss=10.9, seconds=15.0)
    found = measured(start(0), evaluation, *steps(0, 6), start(4), *steps(4, 10), end)
    assert found.status == "finished"
    assert found.values["total_seconds"].value == pytest.approx(22.0 + 50.0)
    assert found.values["val_loss"].value == 10.9


def test_a_missing_checkpoint_line_is_zero_in_our_log_and_unknown_in_an_import() -> None:
    assert measured(start(0), *steps(0, 5)).ledger.checkpoint_s == 0
    saved = Checkpoint(elapsed_seconds=30.0, step=5, seconds=2.0, bytes=1, path="x")
    assert measured(start(0), *steps(0, 5), saved).ledger.checkpoint_s == 2
    imported = start(0, source="nanogpt_log", elapsed_seconds=None)
    assert measured(imported, *steps(0, 5)).ledger.checkpoint_s is None


def test_a_step_time_on_a_shared_processor_says_so() -> None:
    end = End(elapsed_seconds=50.0, status="finished", steps=4, wall_seconds=50.0, others_processor_share=0.83)
    recorded, on_gpu = read(start(0), *steps(0, 4), end), documented_prediction()
    processor = on_gpu.hardware.model_copy(update={"kind": "cpu"})
    for hardware, says in ((processor, True), (on_gpu.hardware, False)):
        measured = measure(recorded, documented_spec(), on_gpu.model_copy(update={"hardware": hardware}))
        assert ("used 83 % of the processor" in measured.values["step_seconds"].how) is says


def test_a_run_before_its_first_step_has_a_report() -> None:
    rows, _ = build_rows(None, documented_spec(), documented_prediction(), measured(start(0)))
    (tokens,) = [row for row in rows if row.id == "tokens_total"]
    assert tokens.why == "nothing of the planned 10.486 billion"


def test_repeated_work_and_restarting_are_parts_of_the_ledger() -> None:
    first = Eval(elapsed_seconds=1.0, step=0, val_loss=10.9, seconds=0.5)
    saved = [Checkpoint(elapsed_seconds=30.0, step=step, seconds=0.25) for step in (4, 6)]
    before = Eval(elapsed_seconds=31.0, step=4, val_loss=6.0, seconds=4.0)
    resumed = [
        Compile(elapsed_seconds=20.0, seconds=12.0, mode="compiled"),
        Eval(elapsed_seconds=25.0, step=4, val_loss=6.0, seconds=5.0),
        *steps(4, 5, elapsed_seconds=33.9),
        End(elapsed_seconds=50.0, status="finished", steps=20_000, wall_seconds=50.0),
    ]
    lines = [start(0), first, *steps(0, 7), *saved, before, start(4), *resumed]
    log = read(*lines)
    assert (log.lost_steps, [c.step for c in log.checkpoints]) == (3, [4])
    ledger = measured(*lines).ledger
    assert ledger.lost_s == pytest.approx(3 * 3.9 + 4.0 + 0.25)
    assert ledger.startup_s == pytest.approx(33.9 - 3.9 - 12.0 - 5.0)
    assert ledger.compile_s == 12.0
    assert ledger.wall_s == pytest.approx(31.0 + 50.0)


def test_a_process_that_died_before_its_first_step_was_all_restarting() -> None:
    compiled = Compile(elapsed_seconds=20.0, seconds=12.0, mode="compiled")
    ledger = measured(start(0), *steps(0, 4), start(4), compiled).ledger
    assert (ledger.startup_s, ledger.lost_s) == (pytest.approx(8.0), 0.0)


def test_a_log_without_a_clock_has_no_restart_time() -> None:
    lines = steps(0, 6, elapsed_seconds=None)
    begun, resumed = (start(first, elapsed_seconds=None) for first in (0, 4))
    ledger = measured(begun, *lines, resumed, *lines[4:]).ledger
    assert (ledger.lost_s, ledger.startup_s) == (None, None)
